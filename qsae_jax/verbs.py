"""What each verb of `qsae` does with the words of the command line. Imported only when a verb runs."""

import json
from argparse import Namespace
from pathlib import Path

from qsae_jax import dictionaries
from qsae_jax.acts.stream import ActivationStream
from qsae_jax.audit.kept import Kept
from qsae_jax.audit.run import audit as run_audit
from qsae_jax.comparison import compare as run_compare
from qsae_jax.dictionaries import tell_apart
from qsae_jax.errors import UserError
from qsae_jax.files import make_folder, new_folder, to_fill
from qsae_jax.given import check_free, notes_of, point_of, record, schemes_of, tell, windows_of
from qsae_jax.jobs import plan_jobs
from qsae_jax.lm.draw import drawing
from qsae_jax.lm.load import load_config, load_lm, stored_as
from qsae_jax.lm.save import save_lm
from qsae_jax.lm.tap import check_point
from qsae_jax.lm.tokenizer import load_tokenizer
from qsae_jax.mesh import mesh_shape, parse_mesh, simulate
from qsae_jax.plan import named_device, written
from qsae_jax.plan import plan as make_plan
from qsae_jax.quant import codebook, control, ggml, grid, group, mx, names, rounding, scale, where
from qsae_jax.quant import scheme as scheme_names
from qsae_jax.quant.fake import departures, fake_quantize, weight_errors
from qsae_jax.quant.names import EXAMPLES
from qsae_jax.quant.scheme import parse_scheme
from qsae_jax.recipe import DEMO
from qsae_jax.record import hook_of, learned, origin
from qsae_jax.report import write_report
from qsae_jax.sae.fit import fit, forget_steps
from qsae_jax.sae.formats import load_stored, save_sae
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.study import run_study
from qsae_jax.sweep import read_studies, run_studies


def demo(given: Namespace, command: str) -> None:
    tell(run_study(DEMO, given.out, command))


def run(given: Namespace, command: str) -> None:
    path = Path(given.study)
    studies, out = read_studies(path, given.set), given.out or f"runs/{path.stem}"
    if list(studies) == [""]:
        tell(run_study(studies[""], out, command))
    else:
        print(f"sweep: {run_studies(studies, out, command)}")


def plan(given: Namespace, command: str) -> None:
    data, model = mesh_shape(given.mesh)
    device = named_device(given.device)
    simulate(data * model)
    for name, study in read_studies(Path(given.study), given.set).items():
        found = make_plan(study, data, model, device)
        print(json.dumps(found.as_dict() | {"study": name}, indent=2) if given.json else written(found, name))


def audit(given: Namespace, command: str) -> None:
    names, out = schemes_of(given), to_fill(given.out)
    mesh = parse_mesh(given.mesh)
    stored = load_stored(given.sae, mesh)
    point = point_of(given, stored)
    check_free(out, "audit", given.model, point)
    lm = load_lm(given.model, mesh=mesh, processing=given.processing, fsdp=given.fsdp)
    windows = windows_of(given, lm)
    notes = notes_of(given, lm, windows, point, {given.sae: (stored, "fp")})
    facts = {"model": given.model, "sae": given.sae, "notes": notes}
    judged = run_audit(lm, stored.sae, windows, names, point, skip_first=given.skip_first,
                       batch=given.batch, mesh=mesh, facts=facts, keep=out / "audit")  # fmt: skip
    judged.write(make_folder(out))
    Kept(out / "audit").forget()
    record(given, command, out)
    tell(write_report(out))


def train(given: Namespace, command: str) -> None:
    schemes, out = schemes_of(given), to_fill(given.out)
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
    asked = given.point or point_of(given, before[given.start])
    lm = load_lm(given.model, mesh=mesh, processing=given.processing, fsdp=given.fsdp)
    windows, point = windows_of(given, lm), check_point(lm, asked)
    target = check_point(lm, given.target) if given.target else None
    twins = {str(scheme): fake_quantize(lm, scheme) for scheme in schemes}
    stream = ActivationStream(twins, point, windows, mesh, batch=how.batch, seed=how.shuffle, target=target,
                              skip_first=given.skip_first, forward=given.batch)  # fmt: skip
    initial = {name: stored.sae for name in jobs for stored in before.values()}
    learnt = before[given.start].metadata if given.start else {}
    seen = learnt.get("training_tokens") if learnt.get("dataset_path") == given.tokens else None
    after = seen if isinstance(seen, int) and seen > 0 else 0
    saes = fit(stream, jobs, SAEConfig(), how.tokens, out / "train", initial, how.log, after)
    for name, sae in saes.items():
        facts = origin(given.model, given.processing, str(point), windows, given.skip_first, given.tokens)
        facts |= learned(jobs[name], how) | ({"hook_name_out": hook_of(str(target))} if target else {})
        save_sae(sae, out / "saes" / name, facts)
        print(f"{name}: {out / 'saes' / name}")
    for name, sae in saes.items() if given.crosscoder else ():
        print(f"{name}: {tell_apart(sae, jobs[name], stream, out / 'saes' / name)}")
    forget_steps(out / "train")
    record(given, command, out)


def compare(given: Namespace, command: str) -> None:
    run_compare(given, command)


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
    tell(write_report(Path(given.folder)))


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
