"""`qsae compare`: dictionaries that are there, judged on windows of which the first may adapt one of them."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from qsae_jax.acts.tokens import Windows, check_windows
from qsae_jax.arms import prices, rows_at
from qsae_jax.compare import adapt, probe
from qsae_jax.compare.transfer import compare as run_compare
from qsae_jax.errors import UserError
from qsae_jax.files import make_folder, to_fill
from qsae_jax.given import check_free, notes_of, point_of, record, schemes_of, tell, windows_of
from qsae_jax.lm.load import load_lm
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, check_point, width_at
from qsae_jax.lm.tokenizer import load_tokenizer
from qsae_jax.mesh import parse_mesh
from qsae_jax.quant.fake import fake_quantize
from qsae_jax.quant.scheme import Scheme
from qsae_jax.report import write_report
from qsae_jax.sae.formats import Stored, load_stored
from qsae_jax.sae.model import SAE, check_width
from qsae_jax.sae.settings import SELECTING
from qsae_jax.sae.sparsity import TopK

GIVEN = ("sae", "retrained", "reseeded", "again", "finetuned", "shuffled")
"""Options that name a dictionary."""
THERE = ("retrained", "again", "finetuned")
"""Those that learnt from the quantized model."""


def compare(given: Namespace, command: str) -> None:
    scheme, *more = schemes_of(given)
    if more:
        raise UserError(f"compare takes one scheme, `{given.schemes}` names {len(more) + 1}: run it once for each")
    if given.again and not given.reseeded:
        raise UserError("--again is --retrained from another seed: give the first dictionary's too, --reseeded")
    mesh, out = parse_mesh(given.mesh), to_fill(given.out)
    folders = {name: getattr(given, name) for name in GIVEN}
    _check_distinct(folders, given.budgets)
    stored = {name: load_stored(folder, mesh) for name, folder in folders.items() if folder}
    fewer = {folder: load_stored(folder, mesh) for folder in given.budgets}
    budgets = _budgets(fewer, given.retrained, stored["retrained"])
    _check_roles(stored, str(scheme))
    saes = {name: one.sae for name, one in stored.items()}
    lm = load_lm(given.model, mesh=mesh, processing=given.processing, fsdp=given.fsdp)
    point = check_point(lm, point_of(given, stored["sae"]))
    check_free(out, "compare", given.model, str(point))
    for sae in [*saes.values(), *budgets.values()]:
        check_width(sae, width_at(lm, point), str(point))
    windows = windows_of(given, lm)
    check_windows(windows, given.skip_first, lm.config.context)
    used = {folders[name]: (one, str(scheme) if name in THERE else "fp") for name, one in stored.items()}
    used |= {folder: (one, str(scheme)) for folder, one in fewer.items()}
    facts = {"model": given.model, "notes": notes_of(given, lm, windows, str(point), used)} | folders
    adapted, nonsense, windows = _adapted(given, lm, scheme, saes["sae"], windows, point, mesh)
    nonsense |= {"shuffled": saes["shuffled"]} if "shuffled" in saes else {}
    adapted |= {"finetuned": saes["finetuned"]} if "finetuned" in saes else {}
    labels = probe.labels(windows, load_tokenizer(given.model)) if given.probes else None
    judged = run_compare(lm, scheme, saes["sae"], saes["retrained"], windows, point, reseeded=saes.get("reseeded"),
                         adapted=adapted, again=saes.get("again"), labels=labels, skip_first=given.skip_first,
                         nonsense=nonsense, budgets=budgets,
                         prices=prices(lm, point, saes["sae"], _selects(stored["retrained"])),
                         batch=given.batch, mesh=mesh, facts=facts)  # fmt: skip
    judged.write(make_folder(out) / "compare.json")
    record(given, command, out)
    print(judged.facts["verdict"]["choice"], "-", judged.facts["verdict"]["reason"])
    tell(write_report(out))


def _check_distinct(folders: Mapping[str, str | None], budgets: Sequence[str]) -> None:
    """Refuse one dictionary in two places."""
    seen = dict[Path, str]()
    for name, folder in [*folders.items(), *(("budgets", folder) for folder in budgets)]:
        if folder and (before := seen.setdefault(Path(folder).resolve(), name)) != name:
            raise UserError(f"--{before} and --{name} are both `{folder}`: give two dictionaries")


def _check_roles(stored: Mapping[str, Stored], scheme: str) -> None:
    """Refuse dictionaries whose own files say that they are not what they are given as."""
    first = stored["sae"]
    for name, one in stored.items():
        facts, there = one.metadata, scheme if name in THERE else "fp"
        if (learnt := facts.get("quantization")) and learnt != there:
            raise UserError(f"--{name} was trained on activations of {learnt}, not of {there}: exchange dictionaries")
        hooks = [str(facts.get("hook_name") or "").replace("hook_", "") for facts in (facts, first.metadata)]
        if all(hooks) and hooks[0] != hooks[1]:
            raise UserError(f"--{name} was trained at {hooks[0]}, --sae at {hooks[1]}: give dictionaries of one point")
        if one.sae.latents != first.sae.latents:
            said = f"--{name} has {one.sae.latents} latents, --sae {first.sae.latents}"
            raise UserError(f"{said}: give dictionaries of one size, or it is the size that is judged")
        if name == "finetuned" and learnt and not facts.get("trained_from"):
            raise UserError("--finetuned does not go on from another dictionary: give what train --from made")
    seeds = [stored[name].metadata.get("seed") for name in ("sae", "reseeded") if name in stored]
    if len(seeds) == 2 and seeds[0] is not None and seeds[0] == seeds[1]:
        raise UserError(f"--reseeded has the seed of --sae, {seeds[0]}: train it with --set train.seed=1")


def _selects(stored: Stored) -> bool:
    """Whether it was trained on lists of codes. A BatchTopK dictionary is stored as what it became, a JumpReLU."""
    training = stored.metadata.get("training")
    named = training.get("sparsity") if isinstance(training, Mapping) else None
    return named in SELECTING if named else isinstance(stored.sae.sparsity, TopK)


def _adapted(
    given: Namespace, lm: LM, scheme: Scheme, sae: SAE, windows: Windows, point: Point, mesh: Mesh
) -> tuple[dict[str, SAE], dict[str, SAE], Windows]:
    """Of the first --adapt tokens adapted dictionaries and a random one; and the windows that are left."""
    if not given.adapt:
        return {}, {}, windows
    some, told = -(-given.adapt // windows.seq), {"skip_first": given.skip_first, "batch": given.batch}
    if len(windows) <= some:
        taken = f"--adapt {given.adapt} takes all {len(windows)} windows, none is left to judge on"
        raise UserError(f"{taken}: lower it, or raise --limit")
    adapt.check_enough(some * (windows.seq - given.skip_first), sae.d)
    home, there = (rows_at(one, windows.part(0, some), point, mesh, **told) for one in (lm, fake_quantize(lm, scheme)))
    random = {"random": adapt.nonsense(sae, home)}
    return dict(adapt.adapted(sae, home, there)), random, windows.part(some, len(windows))


def _budgets(fewer: Mapping[str, Stored], retrained: str, whole: Stored) -> dict[int, SAE]:
    """Dictionaries by the tokens that their files say they learnt from, `retrained` among them."""
    if not fewer:
        return {}
    found: dict[int, SAE] = {}
    for folder, one in (dict(fewer) | {retrained: whole}).items():
        tokens = one.metadata.get("training_tokens")
        if not isinstance(tokens, int) or tokens < 1:
            raise UserError(
                f"`{folder}` does not say from how many tokens it learnt: --budgets takes what qsae trained"
            )
        if began := one.metadata.get("adapted_from") or one.metadata.get("trained_from"):
            raise UserError(f"`{folder}` goes on from `{began}`: --budgets takes what was retrained from scratch")
        if tokens in found:
            raise UserError(f"--budgets: `{folder}` learnt from {tokens} tokens, as another does: leave it out")
        found[tokens] = one.sae
    if max(found) != whole.metadata["training_tokens"]:
        raise UserError(f"--budgets names more tokens, {max(found)}, than --retrained learnt from: exchange them")
    return found
