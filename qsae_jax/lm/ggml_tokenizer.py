"""Tokenizers out of the metadata of a GGUF file: byte-level BPE, and SentencePiece BPE by the scores of its pieces."""

from collections.abc import Callable, Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from qsae_jax.errors import UserError
from qsae_jax.lm.gguf import GGUF

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of `tokenizer.ggml.token_type`."""
SPACE = "\u2581"
"""How SentencePiece writes a space."""


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _by_regex(numbers: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Llama 3 and Qwen 2 differ in how many digits stay together."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": _by_regex(r"\p{N}{1,3}"),
    "qwen2": _by_regex(r"\p{N}"),
    "olmo": _byte_level,
    "mpt": _byte_level,
}
"""How each `tokenizer.ggml.pre` of llama.cpp splits text before the merges."""
COMPOSED = ("qwen2", "olmo", "mpt")
"""Those whose published tokenizer composes characters (NFC) first; the last two are GPT-NeoX's, which Pythia has."""


def build_tokenizer(file: GGUF) -> tuple[Tokenizer, bool]:
    """The tokenizer of a file, and whether llama.cpp puts BOS first where the file does not say."""
    kind, split = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if file.get("general.architecture") == "gptneox" and split in (None, "default", "gpt-2"):
        split = "olmo"  # what older converters wrote; the architecture has one tokenizer
    if kind == "llama":
        inner, adds = _sentencepiece(file), True
    elif kind == "gpt2" and split in SPLITS:
        inner, adds = _byte_level_bpe(file, split), split == "llama-bpe"
    else:
        raise UserError(
            f"`{file.path}`: tokenizer `{kind}/{split}` is not supported "
            f"(gpt2 with {', '.join(SPLITS)}; or llama): give npy:FILE tokens"
        )
    return inner, adds


def _byte_level_bpe(file: GGUF, split: str) -> Tokenizer:
    names, types = _column(file, "tokens"), file.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", [])]
    vocab = {name: i for i, name in enumerate(names)}
    # As llama.cpp: in Llama 3 a word of the vocabulary needs no merges.
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split == "llama-bpe"))
    if split in COMPOSED:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = SPLITS[split]()
    inner.decoder = decoders.ByteLevel()
    _match_whole(inner, names, types)
    return inner


def _sentencepiece(file: GGUF) -> Tokenizer:
    """SentencePiece joins the adjacent pieces that make the best-scored piece, which merges in order of score do.

    One case differs: of two places whose pieces have equal scores it takes the left one, merges take the lower id.
    Published vocabularies have no equal scores.
    """
    names, types, scores = (_column(file, key) for key in ("tokens", "token_type", "scores"))
    unknown = file.get("tokenizer.ggml.unknown_token_id", 0)
    if not len(names) == len(types) == len(scores) > unknown:
        raise UserError(f"`{file.path}`: tokens, scores and token types differ in number: download it again")
    # Older converters leave the spaces of user-defined tokens escaped; these are looked for in the raw text.
    names = [n.replace(SPACE, " ") if t == USER_DEFINED else n for n, t in zip(names, types, strict=True)]
    inner = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=_merges(names, types, scores),
            unk_token=names[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in types,
        )
    )
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    escape = normalizers.Replace(" ", SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _match_whole(inner, names, types)
    return inner


def _merges(names: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the best-scored pieces first. Only text pieces are made of or by others."""
    pieces = {name: i for i, name in enumerate(names) if types[i] in (NORMAL, UNUSED)}
    merges: list[tuple[str, str]] = []
    for name, _ in sorted(pieces.items(), key=lambda item: (-scores[item[1]], item[1])):
        halves = ((name[:k], name[k:]) for k in range(1, len(name)))
        known = [(left, right) for left, right in halves if left in pieces and right in pieces]
        merges.extend(sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]])))
    return merges


def _match_whole(inner: Tokenizer, names: Iterable[str], types: Iterable[int]) -> None:
    """Control and user-defined tokens are found before anything is split. Only the former are special: what is
    user-defined (Gemma's runs of newlines) is text, and stays when special tokens are left out."""
    kinds = (UNKNOWN, CONTROL, USER_DEFINED)
    found = [(name, kind) for name, kind in zip(names, types, strict=False) if kind in kinds]
    inner.add_tokens([AddedToken(name, special=kind != USER_DEFINED, normalized=False) for name, kind in found])


def _column(file: GGUF, key: str) -> list:
    values = file.get(f"tokenizer.ggml.{key}")
    if values is None:
        raise UserError(f"`{file.path}` has no `tokenizer.ggml.{key}`: convert it again, or give npy:FILE tokens")
    return values
