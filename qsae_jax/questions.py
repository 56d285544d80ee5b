"""What a study asks beyond its audit, each answer a file of its own: perplexity by protocol, who survives, the texts of
the most damaged features, and whether features still act."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from qsae_jax.acts.tokens import Windows, check_windows, load_windows
from qsae_jax.asked import CloserConfig
from qsae_jax.audit import predict
from qsae_jax.audit.act import act, summary
from qsae_jax.audit.contexts import contexts, with_text
from qsae_jax.audit.protocols import cut, perplexities
from qsae_jax.errors import UserError
from qsae_jax.files import read_features, read_json
from qsae_jax.hosts import here
from qsae_jax.lm.model import LM
from qsae_jax.lm.tokenizer import load_tokenizer
from qsae_jax.progress import progress, stop_signal
from qsae_jax.quant.fake import fake_quantize
from qsae_jax.quant.scheme import Scheme, parse_scheme
from qsae_jax.recipe import Study
from qsae_jax.sae.formats import load_sae
from qsae_jax.sae.model import SAE

Columns = dict[str, np.ndarray]


def applied(folder: Path) -> dict[str, Scheme]:
    """The schemes of an audit as they were applied: a matched control with the strength that was found."""
    rows = read_json(folder / "audit.json")["rows"]
    return {row["scheme"]: parse_scheme((row.get("matched") or row)["scheme"]) for row in rows}


def most_damaging(folder: Path, wanted: str) -> str:
    """The scheme that is asked for, else the quantizer that leaves the fewest features."""
    rows = [row for row in read_json(folder / "audit.json")["rows"] if row["survived"] is not None]
    if not rows:
        raise UserError("no feature is active at full precision: there is none to look at more closely")
    if wanted:
        return wanted
    return min([row for row in rows if not row["control"]] or rows, key=lambda row: row["survived"])["scheme"]


def by_protocol(study: Study, lm: LM, folder: Path, mesh: Mesh) -> dict[str, Any]:
    """`perplexity.json`."""
    tokenizer, vocab, cuts = load_tokenizer(study.model), lm.config.vocab, {}
    text = load_windows(study.tokens.source, tokenizer, 2, "never", vocab)  # pairs: no more than the last token is lost
    for protocol in study.perplexity:
        cuts[protocol] = cut(protocol, text.ids.reshape(-1), tokenizer.bos_id, text.source)
        check_windows(cuts[protocol][0], 0, lm.config.context)
    rows = perplexities(lm, cuts, applied(folder), mesh, study.batch)
    return {"protocols": {one.name: one.described for one in study.perplexity}, "rows": rows}


def who_survives(study: Study, folder: Path, sae: SAE) -> dict[str, Any]:
    """`predict.json`."""
    columns, own = read_features(folder / "features.parquet"), predict.clusters(np.asarray(here(sae.W_dec[...])))
    key, names = _key(sae), study.predict.schemes
    tables = {name: predict.Table(columns[name], own, key) for name in names}
    found: dict[str, Any] = {"schemes": {}}
    with progress("who survives", len(names) + 1) as advance:
        for name in names:
            active = columns[name]["active"]
            survived = predict.survived(columns[name])
            deciles = {
                key: predict.deciles(columns[name][key][active], survived) for key in ("firing_rate", "max_activation")
            }
            answer = predict.predict(columns[name], own[active])
            paper = predict.paper_protocol(columns[name])
            found["schemes"][name] = answer | {"paper_protocol": paper, "deciles": deciles}
            advance(1)
        others = {point: folder / "at" / point for point in study.at} | {
            name: Path(name) for name in study.predict.others
        }
        tables |= {f"{name}: {names[0]}": _other(other, names[0]) for name, other in others.items()}
        found["transfer"] = predict.transfer(tables)
        advance(1)
    return found


def _key(sae: SAE) -> str:
    """What tells one dictionary's features from another's."""
    return hashlib.sha256(np.asarray(here(sae.W_dec[...])).tobytes()).hexdigest()


def _other(folder: Path, scheme: str) -> predict.Table:
    """Another audit's features under the same scheme."""
    columns = read_features(folder / "features.parquet")
    if scheme not in columns:
        raise UserError(f"`{folder}` has no features under `{scheme}`, only {', '.join(columns)}: audit it there too")
    named = read_json(folder / "audit.json").get("sae", "")
    sae = load_sae(own if (own := folder / named).exists() else named)
    return predict.Table(columns[scheme], predict.clusters(np.asarray(here(sae.W_dec[...]))), _key(sae))


def _chosen(config: CloserConfig, columns: Columns, spread: bool) -> list[int]:
    """Features that fire often enough: the most damaged ones, or evenly from the whole order of damage."""
    some = np.flatnonzero(columns["active"] & ~columns["few"])
    if not len(some):
        raise UserError("no active feature fires often enough to be looked at more closely: audit more tokens")
    some = some[np.argsort(np.nan_to_num(columns["r"][some]), kind="stable")]
    count = min(config.features, len(some))
    return (some[np.linspace(0, len(some) - 1, count).round().astype(int)] if spread else some[:count]).tolist()


def closer(study: Study, lm: LM, sae: SAE, windows: Windows, folder: Path, mesh: Mesh, what: str) -> dict[str, Any]:
    """`contexts.json` or `act.json`: `what` names the key of the study."""
    config: CloserConfig = getattr(study, what)
    name = most_damaging(folder, config.scheme)
    columns = read_features(folder / "features.parquet")[name]
    some = _chosen(config, columns, what == "act")
    windows = windows.part(0, max(config.tokens // windows.seq, 1))
    twin = fake_quantize(lm, applied(folder)[name])
    facts = {"scheme": name, "tokens": windows.described(study.tokens.skip_first)}
    told: Mapping[str, Any] = {"mesh": mesh, "skip_first": study.tokens.skip_first, "batch": study.batch}
    with stop_signal() as stopped:
        if what == "contexts":
            with progress("contexts", len(windows) * windows.seq) as advance:
                found = contexts(lm, twin, sae, windows, study.point, some, stopped=stopped, advance=advance, **told)
            words = study.tokens.source.startswith("npy:")
            found = found if words else with_text(found, load_tokenizer(study.model))
        else:
            with progress("act", (len(windows) + 2 * len(some)) * windows.seq) as advance:
                found = act(lm, twin, sae, windows, study.point, some, stopped=stopped, advance=advance, **told)
            facts |= {"summary": summary(found, columns["r"])}
    keys = ("r", "r_pre", "cause", "firing_rate", "firing_rate_twin", "max_activation", "max_activation_twin")
    marks = [{key: columns[key][i : i + 1].tolist()[0] for key in keys} for i in some]
    return facts | {"features": [one | mark for one, mark in zip(found, marks, strict=True)]}
