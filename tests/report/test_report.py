"""The page: self-contained, its numbers those of the files, and made from whatever part of a run is there."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qsae_jax.errors import UserError
from qsae_jax.report import write_report
from qsae_jax.report.figures import deciles, spread

TOKENS = {"n": 320, "seq": 16, "bos": False, "skip_first": 1, "counted": 300, "source": "made <up>"}
ROW = {"ppl": 20.25, "delta_ppl": 0.0125, "kl": 0.0123, "weight_rel_error": 0.15, "activation_rel_mse": 0.06}
ROW |= {"survived": 0.625, "blurred": 0.25, "damaged": 0.125, "mean_r": 0.8, "median_r": 0.9, "fvu": 0.31, "l0": 4.0}
MEASURE = {"value": 0.4321, "low": 0.4, "high": 0.47}
ARM = {"trained_on": "fp", "judged_on": "int4"} | dict.fromkeys(
    ("fvu", "l0", "alive", "dense", "ce_recovered", "kl_recovered"), MEASURE
)


@pytest.fixture
def folder(tmp_path):
    """A run directory with one number that differs from all others in each place."""
    rng = np.random.default_rng(0)
    noise = ROW | {"scheme": "noise@int4", "survived": 0.5, "blurred": 0.2, "damaged": 0.3}
    audit = {"model": "x/model.gguf", "sae": "saes/fp", "point": "blocks.8.resid_post", "notes": ["<b>as shipped</b>"]}
    audit |= {"tokens": TOKENS, "reference": {"ppl": 20.0, "fvu": 0.2987, "l0": 4.0, "active": 30, "latents": 40}}
    audit |= {"rows": [ROW | {"scheme": "int4"}, noise]}
    matching = {name: {"value": 0.8, "floor": None} for name in ("mmcs", "mnn", "assigned")}
    verdict = {"choice": "retrain", "reason": "because of numbers", "interval": [0.1, 0.2], "floor": 0.01}
    compare = {"model": "x/model.gguf", "point": "blocks.8.resid_post", "scheme": "int4", "notes": [], "tokens": TOKENS}
    compare |= {"rows": [ARM | {"arm": arm} for arm in ("reference", "transferred", "retrained")]}
    compare |= {"matching": matching, "verdict": verdict}
    for name, facts in (("audit", audit), ("compare", compare)):
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    names = ("firing_rate", "mean_activation", "max_activation")
    table = {"scheme": np.repeat(["int4", "noise@int4"], 40), "feature": np.tile(np.arange(40), 2)}
    table |= {"active": np.tile(np.arange(40) < 30, 2), "r": rng.uniform(0.2, 1, 80)}
    table |= {name + tail: rng.uniform(size=80) for name in names for tail in ("", "_twin")}
    table["r"][17] = 0.0123
    pq.write_table(pa.table(table), tmp_path / "features.parquet")
    (tmp_path / "train").mkdir()
    lines = [{"tokens": 512 * i, "loss": 1.0, "fvu": 0.5 / i, "l0": 4, "dead": 0.1, "tokens_per_s": 9} for i in (1, 2)]
    (tmp_path / "train" / "fp.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = {"command": "qsae demo", "versions": {"jax": "9.9"}, "settings": {"point": "p"}, "stages": []}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path


class Page(HTMLParser):
    """Tags, what they refer to, and the cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.refers, self.cells, self.open = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open = tag
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and not (value or "").startswith("#"):
                self.refers.append(value)

    def handle_data(self, data):
        if self.open == "td" and data.strip():
            self.cells.append(data.strip())


def test_the_page_holds_everything_and_fetches_nothing(folder):
    text = write_report(folder).read_text()
    page = Page(text)
    assert page.refers == [] and "script" not in page.tags and "link" not in page.tags and "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert page.tags.count("svg") == 5 and page.tags.count("table") == 4
    assert "<b>as shipped" not in text and "&lt;b&gt;as shipped" in text and "made &lt;up&gt;" in text
    ids = re.findall(r' id="([^"]+)"', text)
    captions = [i for i in ids if i.startswith("caption")]
    assert len(captions) == len(set(captions)) == 5


def test_the_numbers_are_those_of_the_files(folder):
    cells = Page(write_report(folder).read_text()).cells
    row = [
        "int4",
        "20.25",
        "+1.25 %",
        "0.0123",
        "0.15",
        "0.06",
        "62.5 %",
        "25.0 %",
        "12.5 %",
        "0.8",
        "0.9",
        "0.31",
        "4",
    ]
    at = cells.index("int4")
    assert cells[at : at + len(row)] == row
    assert cells[:4] == ["fp", "20", "–", "–"] and "0.299" in cells
    worst = cells.index("17")
    assert cells[worst + 1] == "0.0123", "the most damaged feature comes first"
    assert "0.432 [0.4, 0.47]" in cells and "43.2 % [40.0, 47.0]" in cells


def test_the_same_results_give_the_same_page(folder):
    first = write_report(folder).read_text()
    assert write_report(folder).read_text() == first
    facts = json.loads((folder / "audit.json").read_text())
    facts["rows"][0]["survived"] = 0.6
    (folder / "audit.json").write_text(json.dumps(facts))
    assert write_report(folder).read_text() != first


@pytest.mark.parametrize(
    "gone, tables", [("audit.json", 2), ("compare.json", 2), ("features.parquet", 3), ("run.json", 4)]
)
def test_a_part_of_a_run_is_told_too(folder, gone, tables):
    (folder / gone).unlink()
    assert Page(write_report(folder).read_text()).tags.count("table") == tables


def test_an_empty_or_broken_folder_is_refused(folder, tmp_path):
    (folder / "features.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="parquet"):
        write_report(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither"):
        write_report(tmp_path / "empty")


def test_missing_numbers_are_dashes(folder):
    """An audit in which no feature was active has no shares: null in the file, a dash on the page."""
    facts = json.loads((folder / "audit.json").read_text())
    for row in facts["rows"]:
        row |= dict.fromkeys(("survived", "blurred", "damaged", "mean_r", "median_r"))
    (folder / "audit.json").write_text(json.dumps(facts))
    text = write_report(folder).read_text()
    assert "100.0 %" not in text and "no active feature" in text
    assert re.findall(r">\s*-?nan", text) == []


def test_deciles_are_medians_of_tenths():
    """Against a sort in NumPy; the control orders by another quantity."""
    rng = np.random.default_rng(0)
    values, r = rng.permutation(200).astype(float), rng.uniform(size=200)
    wanted = [np.median(r[(values >= 20 * i) & (values < 20 * (i + 1))]) for i in range(10)]
    np.testing.assert_allclose(deciles(values, r), wanted)
    assert np.abs(deciles(rng.permutation(values), r) - wanted).max() > 0.05
    assert np.isnan(deciles(values[:4], r[:4])[-1])


def test_controls_are_told_as_what_they_are(folder):
    """A matched control names what was found; draws tell their spread; no control is the worst scheme. Control: the
    rows without the mark."""
    facts = json.loads((folder / "audit.json").read_text())
    matched = {"scheme": "prune0.123", "ppl": 30.0, "wanted_ppl": 30.1, "error": -0.003}
    facts["rows"] += [
        ROW | {"scheme": "prune~int4", "survived": 0.1, "control": True, "matched": matched},
        ROW | {"scheme": "noise@int4#1", "survived": 0.55, "control": True},
        ROW | {"scheme": "bf16", "survived": 0.99, "control": True},
    ]
    (folder / "audit.json").write_text(json.dumps(facts))
    text = write_report(folder).read_text()
    assert "prune~int4 (prune0.123)" in text
    assert "2 draws of noise@int4: 50.0 % to 55.0 % of the features survive." in text
    assert "int4: of 30 active features 62.5 % survive" in text
    for row in facts["rows"]:
        row.pop("control", None)
    (folder / "audit.json").write_text(json.dumps(facts))
    assert "prune~int4: of 30 active features 10.0 % survive" in write_report(folder).read_text()


def test_no_more_curves_than_colours():
    names = [f"int{i}" for i in range(40)]
    shown = spread(names)
    assert len(shown) == 7 and shown[0] == "int0" and shown[-1] == "int39" and spread(names[:7]) == names[:7]
