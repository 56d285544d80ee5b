"""One page that holds everything: figures inline, no script, nothing fetched."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qsae_jax.errors import UserError
from qsae_jax.files import write_text
from qsae_jax.report import answers, figures, tables, verdicts
from qsae_jax.report.part import Part
from qsae_jax.report.results import Results, read_results


def write_report(folder: Path) -> Path:
    """Write `report.html` from the results in a folder, and give its path."""
    try:
        html = _page(read_results(folder))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"the results in `{folder}` are not complete ({error!r}): make them again") from error
    path = folder / "report.html"
    write_text(path, html)
    return path


def _page(results: Results) -> str:
    loader = jinja2.PackageLoader("qsae_jax", "report")
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return env.get_template("page.html.jinja").render(
        head=results.head,
        title=f"{_short(results.head.get('model', ''))} at {results.head.get('point', '')}",
        heads=verdicts.heads(results),
        sentences=tables.sentences(results),
        sections=sections(results),
        facts=facts(results),
        settings=json.dumps((results.run or {}).get("settings", {}), indent=2),
        run=results.run,
        Markup=Markup,
    )


def _short(model: str) -> str:
    return Path(model.partition("#")[0]).name or model


def sections(results: Results) -> list[tuple[str, list[Part]]]:
    """The page's sections, those that there are results for."""
    made = [("Features under each scheme", _audit_parts(results)), *answers.sections(results)]
    made += [("Keep, adapt or retrain", verdicts.parts(results))]
    if results.curves:
        shown = figures.spread(list(results.curves))
        caption = "Training on one stream of tokens in one order; a smaller budget is its beginning." + _some(
            results.curves, shown
        )
        made.append(("Training", [Part("training", caption, figures.training({n: results.curves[n] for n in shown}))]))
    return [(title, parts) for title, parts in made if parts]


def _audit_parts(results: Results) -> list[Part]:
    if not results.audit or not results.audit["rows"]:
        return []
    rows = results.audit["rows"]
    parts = [
        Part("bands", "What becomes of the features that are active at full precision.", figures.bands(rows)),
        Part("perplexity", "What perplexity sees, and what the features see.", figures.perplexity(rows)),
        Part("audit", "The audit in numbers.", table=tables.audit_table(results.audit)),
    ]
    if results.features:
        caption = "Median correlation of active features with themselves, by tenths; dotted lines at 0.9 and 0.5."
        shown = figures.spread(list(results.features))
        caption += _some(results.features, shown)
        parts.append(Part("deciles", caption, figures.by_decile({name: results.features[name] for name in shown})))
    if scheme := tables.worst_scheme(results):
        caption = f"The {tables.WORST} active features that {scheme} damages most; on few tokens r is uncertain."
        counted = results.audit["tokens"]["counted"]
        parts.append(Part("worst", caption, table=tables.worst_table(results.features[scheme], counted)))
    return parts


def _some(found: Mapping[str, Any], shown: Sequence[str]) -> str:
    return f" Of {len(found)} curves {len(shown)}, evenly from their order." if len(shown) < len(found) else ""


def facts(results: Results) -> list[tuple[str, str]]:
    """What was run, as pairs."""
    head, run = results.head, results.run or {}
    tokens: dict[str, Any] = head.get("tokens", {})
    said = [("model", str(head.get("model", ""))), ("point", str(head.get("point", "")))]
    if (processing := head.get("processing", "none")) != "none":
        said.append(("processing of its weights", str(processing)))
    if results.audit:
        base = results.audit["reference"]
        said += [("dictionary", f"{results.audit['sae']}: {base['latents']:,} latents, {base['active']:,} active")]
        said += [("tokens of the audit", _tokens(tokens))]
    if results.compare:
        said += [("tokens of the comparison", _tokens(results.compare["tokens"]))]
    said += [("command", run["command"])] if run.get("command") else []
    said += [("seconds", ", ".join(f"{s['name']} {s['seconds']:g}" for s in run["stages"]))] if "stages" in run else []
    said += [("versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items()))] if "versions" in run else []
    return [(name, value) for name, value in said if value]


def _tokens(tokens: dict[str, Any]) -> str:
    bos = "with" if tokens["bos"] else "without"
    return (
        f"{tokens['n']:,} of {tokens['source']} in windows of {tokens['seq']}, {bos} BOS, "
        f"the first {tokens['skip_first']} of each left out of feature statistics"
    )
