"""What each verb of `qsae` does with the words of the command line. Imported only when a verb runs."""

from argparse import Namespace
from pathlib import Path

from jax.sharding import Mesh

from qsae_jax import dictionaries
from qsae_jax.acts.stream import ActivationStream
from qsae_jax.acts.tokens import Windows, load_windows
from qsae_jax.arms import prices, rows_at
from qsae_jax.audit.run import audit as run_audit
from qsae_jax.compare import adapt, probe
from qsae_jax.compare.transfer import compare as run_compare
from qsae_jax.dictionaries import tell_apart
from qsae_jax.errors import UserError
from qsae_jax.files import make_folder, new_folder, read_json, write_json
from qsae_jax.jobs import plan_jobs
from qsae_jax.lm.draw import drawing
from qsae_jax.lm.load import load_config, load_lm, stored_as
from qsae_jax.lm.model import LM
from qsae_jax.lm.save import save_lm
from qsae_jax.lm.tap import Point, check_point
from qsae_jax.lm.tokenizer import load_tokenizer
from qsae_jax.mesh import parse_mesh
from qsae_jax.quant import codebook, control, ggml, grid, group, mx, names, rounding, scale, where
from qsae_jax.quant import scheme as scheme_names
from qsae_jax.quant.fake import departures, fake_quantize, weight_errors
from qsae_jax.quant.names import EXAMPLES
from qsae_jax.quant.scheme import Scheme, parse_scheme, parse_schemes
from qsae_jax.recipe import DEMO
from qsae_jax.record import described, differences, hook_of, learned, notes_on, origin
from qsae_jax.report import write_report
from qsae_jax.sae.fit import fit, forget_steps
from qsae_jax.sae.formats import Stored, load_stored, save_sae
from qsae_jax.sae.model import SAE
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sparsity import TopK
from qsae_jax.study import run_study
from qsae_jax.sweep import read_studies, run_studies


def demo(given: Namespace, command: str) -> None:
    _tell(run_study(DEMO, given.out, command))


def run(given: Namespace, command: str) -> None:
    path = Path(given.study)
    studies, out = read_studies(path, given.set), given.out or f"runs/{path.stem}"
    if list(studies) == [""]:
        _tell(run_study(studies[""], out, command))
    else:
        print(f"sweep: {run_studies(studies, out, command)}")


def audit(given: Namespace, command: str) -> None:
    names, out = _schemes(given), make_folder(Path(given.out))
    mesh = parse_mesh(given.mesh)
    stored = load_stored(given.sae, mesh)
    point = _point(given, stored)
    lm = load_lm(given.model, mesh=mesh, processing=given.processing)
    windows = _windows(given, lm)
    notes = _notes(given, lm, windows, point, {given.sae: (stored, "fp")})
    facts = {"model": given.model, "sae": given.sae, "notes": notes}
    judged = run_audit(lm, stored.sae, windows, names, point, skip_first=given.skip_first,
                       batch=given.batch, mesh=mesh, facts=facts)  # fmt: skip
    judged.write(out)
    _record(given, command, out)
    _tell(write_report(out))


def train(given: Namespace, command: str) -> None:
    schemes, out = _schemes(given), make_folder(Path(given.out))
    mesh = parse_mesh(given.mesh)
    before = {given.start: load_stored(given.start, mesh)} if given.start else {}
    names = [str(scheme) for scheme in schemes]
    if given.crosscoder and given.target:
        raise UserError("--crosscoder reconstructs what it reads: leave out --target, or --crosscoder")
    if given.crosscoder and len(names) < 2:
        raise UserError("--crosscoder reads several twins side by side: name them with --schemes, for example fp,int4")
    jobs, how = plan_jobs([names] if given.crosscoder else [[name] for name in names], given.sae, given.set, before,
                          transcodes=bool(given.target))  # fmt: skip
    if not given.point and not before:
        raise UserError("train needs --point, for example --point blocks.8.resid_post; `qsae points` lists them")
    asked = given.point or _point(given, before[given.start])
    lm = load_lm(given.model, mesh=mesh, processing=given.processing)
    windows, point = _windows(given, lm), check_point(lm, asked)
    target = check_point(lm, given.target) if given.target else None
    twins = {str(scheme): fake_quantize(lm, scheme) for scheme in schemes}
    stream = ActivationStream(twins, point, windows, mesh, batch=how.batch, seed=how.shuffle, target=target,
                              skip_first=given.skip_first, forward=given.batch)  # fmt: skip
    initial = {name: stored.sae for name in jobs for stored in before.values()}
    saes = fit(stream, jobs, SAEConfig(), how.tokens, out / "train", initial, how.log)
    for name, sae in saes.items():
        facts = origin(given.model, given.processing, str(point), windows, given.skip_first, given.tokens)
        facts |= learned(jobs[name], how) | ({"hook_name_out": hook_of(str(target))} if target else {})
        save_sae(sae, out / "saes" / name, facts)
        print(f"{name}: {out / 'saes' / name}")
    for name, sae in saes.items() if given.crosscoder else ():
        print(f"{name}: {tell_apart(sae, jobs[name], stream, out / 'saes' / name)}")
    forget_steps(out / "train")
    _record(given, command, out)


def compare(given: Namespace, command: str) -> None:
    scheme, *more = _schemes(given)
    if more:
        raise UserError(f"compare takes one scheme, `{given.schemes}` names {len(more) + 1}: run it once for each")
    mesh = parse_mesh(given.mesh)
    if Path(given.sae).resolve() == Path(given.retrained).resolve():
        raise UserError(f"--sae and --retrained are both `{given.sae}`: give two dictionaries")
    out = make_folder(Path(given.out))
    folders = {
        name: getattr(given, name) for name in ("sae", "retrained", "reseeded", "again", "finetuned", "shuffled")
    }
    stored = {name: load_stored(folder, mesh) for name, folder in folders.items() if folder}
    saes = {name: one.sae for name, one in stored.items()}
    point = _point(given, stored["sae"])
    lm = load_lm(given.model, mesh=mesh, processing=given.processing)
    windows = _windows(given, lm)
    learnt = {"retrained": str(scheme), "again": str(scheme), "finetuned": str(scheme)}
    used = {folders[name]: (one, learnt.get(name, "fp")) for name, one in stored.items()}
    facts = {"model": given.model, "notes": _notes(given, lm, windows, point, used)} | folders
    adapted, nonsense, windows = _adapted(given, lm, scheme, saes["sae"], windows, check_point(lm, point), mesh)
    nonsense |= {"shuffled": saes["shuffled"]} if "shuffled" in saes else {}
    adapted |= {"finetuned": saes["finetuned"]} if "finetuned" in saes else {}
    labels = probe.labels(windows, load_tokenizer(given.model)) if given.probes else None
    judged = run_compare(lm, scheme, saes["sae"], saes["retrained"], windows, point, reseeded=saes.get("reseeded"),
                         adapted=adapted, again=saes.get("again"), labels=labels, skip_first=given.skip_first,
                         nonsense=nonsense, budgets=_budgets(given, stored["retrained"], mesh),
                         prices=prices(lm, check_point(lm, point), saes["sae"], isinstance(saes["sae"].sparsity, TopK)),
                         batch=given.batch, mesh=mesh, facts=facts)  # fmt: skip
    judged.write(out / "compare.json")
    _record(given, command, out)
    print(judged.facts["verdict"]["choice"], "-", judged.facts["verdict"]["reason"])
    _tell(write_report(out))


def _adapted(
    given: Namespace, lm: LM, scheme: Scheme, sae: SAE, windows: Windows, point: Point, mesh: Mesh
) -> tuple[dict[str, SAE], dict[str, SAE], Windows]:
    """Of the first --adapt tokens adapted dictionaries and a random one; and the windows that are left."""
    if not given.adapt:
        return {}, {}, windows
    some, told = -(-given.adapt // windows.seq), {"skip_first": given.skip_first, "batch": given.batch}
    if len(windows) <= some:
        raise UserError(f"--adapt {given.adapt} takes all {len(windows)} windows: none is left to judge on")
    home, there = (rows_at(one, windows.part(0, some), point, mesh, **told) for one in (lm, fake_quantize(lm, scheme)))
    random = {"random": adapt.nonsense(sae, home)}
    return dict(adapt.adapted(sae, home, there)), random, windows.part(some, len(windows))


def _budgets(given: Namespace, retrained: Stored, mesh: Mesh) -> dict[int, SAE]:
    """Dictionaries by the tokens that their files say they learnt from, `retrained` among them."""
    if not given.budgets:
        return {}
    found: dict[int, SAE] = {}
    for folder in [*given.budgets, given.retrained]:
        one = retrained if folder == given.retrained else load_stored(folder, mesh)
        tokens = one.metadata.get("training_tokens")
        if not tokens:
            raise UserError(
                f"`{folder}` does not say from how many tokens it learnt: --budgets takes what qsae trained"
            )
        if tokens in found:
            raise UserError(f"--budgets: `{folder}` learnt from {tokens} tokens, as another does: leave it out")
        found[tokens] = one.sae
    if max(found) != retrained.metadata["training_tokens"]:
        raise UserError(f"--budgets names more tokens, {max(found)}, than --retrained learnt from: exchange them")
    return found


def quantize(given: Namespace, command: str) -> None:
    scheme = parse_scheme(given.scheme).within(given.layers)
    out = new_folder(Path(given.out))
    lm = load_lm(given.model)
    for note in departures(lm, scheme):
        print(f"note: {note}")
    twin = fake_quantize(lm, scheme)
    try:
        tokenizer = load_tokenizer(given.model)
    except UserError as error:
        tokenizer = None
        print(f"without a tokenizer: {error}")
    before = stored_as(given.model)
    said = f"{scheme}, written by qsae quantize from {given.model}" + (f": {before}" if before else "")
    save_lm(twin, out, {"qsae_jax": said}, tokenizer)
    print(f"{out}: {scheme}, relative weight error {weight_errors(lm, twin)['all']:.5f}")


def report(given: Namespace, command: str) -> None:
    _tell(write_report(Path(given.folder)))


def sae(given: Namespace, command: str) -> None:
    getattr(dictionaries, given.what)(given)


def schemes(given: Namespace, command: str) -> None:
    for page in (scheme_names, names, where, grid, group, scale, rounding, codebook, mx, ggml, control):
        print((page.__doc__ or "").strip() + "\n")
    print("examples: " + " ".join(EXAMPLES))


def points(given: Namespace, command: str) -> None:
    config = load_config(given.model)
    try:
        bos = load_tokenizer(given.model).adds_bos
    except UserError:
        bos = None
    print(drawing(given.model, config, bos))


def _tell(path: Path) -> None:
    print(f"report: {path}")


def _record(given: Namespace, command: str, out: Path) -> None:
    """`run.json`, unless a study keeps its own there."""
    file = out / "run.json"
    if not (file.is_file() and read_json(file).get("stages")):
        write_json(file, described(command, vars(given)))


def _schemes(given: Namespace) -> tuple[Scheme, ...]:
    return tuple(scheme.within(given.layers) for scheme in parse_schemes(given.schemes))


def _windows(given: Namespace, lm: LM) -> Windows:
    tokenizer = None if given.tokens.startswith("npy:") else load_tokenizer(given.model)
    windows = load_windows(given.tokens, tokenizer, given.seq, given.bos, lm.config.vocab)
    if 0 < given.limit < windows.seq:
        raise UserError(f"--limit {given.limit} is less than one window of {windows.seq}: raise it, or lower --seq")
    return windows.part(0, given.limit // windows.seq) if given.limit else windows


def _point(given: Namespace, stored: Stored) -> str:
    point = given.point or stored.metadata.get("hook_name")
    if not isinstance(point, str):
        raise UserError("the dictionary's file names no hook: give --point, for example blocks.8.resid_post")
    return str(Point.parse(point))


def _notes(given: Namespace, lm: LM, windows: Windows, point: str, used: dict[str, tuple[Stored, str]]) -> list[str]:
    """What a reader must know, and where a dictionary's own record differs from how it is used here: for each folder
    the dictionary and the scheme whose activations it should have learnt."""
    notes = notes_on(given.model, lm.config.processing)
    bos = None if given.tokens.startswith("npy:") else windows.bos
    for folder, (stored, scheme) in used.items():
        said = differences(stored.metadata, model=given.model, config=lm.config, point=point, scheme=scheme,
                           tokens=given.tokens, bos=bos)  # fmt: skip
        notes += [f"The dictionary {folder} {what}." for what in said]
    for note in notes:
        print(f"note: {note}")
    return notes
