"""Fuzzed text gets the same ids from a family's tokenizer.json and from the GGUF metadata made of it.

Small vocabularies are trained here, each behind the pre-tokenizer of its family's own tokenizer.json, and written both
ways: as the tokenizers library saves them, and under the keys that llama.cpp's converter writes (conversion/base.py).
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import Oracle, import_oracle
from test_tokenizer import CASES, FRAGMENTS, KEY, REFERENCES
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from tinyserve.text.tokenizer import Tokenizer
from tinyserve.text.tokenizer.gguf import TokenType
from tinyserve.text.tokenizer.tokenizer import Tokenizer as OurTokenizer

# The name that llama.cpp gives the pre-tokenizer -> the special tokens of the model, BOS and EOS first, and whether
# BOS is added. Granite 3 is Refact's, Granite 4 is dbrx's.
FAMILIES: dict[str, tuple[list[str], bool]] = {
    "gpt-2": (["<|endoftext|>"], False),
    "llama-bpe": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"], True),
    "falcon": (["<|endoftext|>", ">>TITLE<<", ">>QUESTION<<"], False),
    "refact": (["<|end_of_text|>", "<fim_prefix>", "<|start_of_role|>"], False),
    "dbrx": (["<|end_of_text|>", "<|pad|>", "<|start_of_role|>", "<|end_of_role|>"], False),
    "smollm": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], False),
    "qwen2": (["<|endoftext|>", "<|im_end|>", "<|im_start|>"], False),
}
PLAIN = "<tool_call>"  # an added token that is text: user-defined, for GGUF
ENGLISH = (Path(__file__).parents[1] / "data" / "english.txt").read_text(encoding="utf-8")
AWKWARD = [
    *FRAGMENTS, "👨‍👩‍👧‍👦", "👍🏽", "🇫🇷", "日本語", "한국어", "नमस्ते", "cafe\u0301", "ﬁ", "ß", "Ⅷ", "1234567", "٣", "  ",
    "   ", "\t", "\n\n", "\r", "\u00a0", "\u3000", "\u200b", "\ufeff", "\x00", "\x7f", "don't", "WE'RE", "'tis", "...",
    "__", "//", "<|endoftext|>", "<|end_of_text|>", "<|im_start|>", "<|begin_of_text|>", ">>TITLE<<", "<s>", "</s>",
    "<unk>", "<0x41>", "▁", "▁▁", "<|user|>", PLAIN, "<|start_of_role|>user<|end_of_role|>", "<|",
]  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(AWKWARD), st.characters(codec="utf-8"))).map("".join))
CORPUS = [*ENGLISH.splitlines(keepends=True), *(" ".join(AWKWARD[:40]),) * 3]


def converted(backend: Backend, types: dict[str, int], **more: Any) -> dict[str, Any]:
    """A vocabulary as llama.cpp's converter writes it (TextModel.get_vocab_base): pieces by id, and what they are."""
    vocab = backend.get_vocab(with_added_tokens=True)
    pieces = sorted(vocab, key=vocab.__getitem__)
    assert [vocab[piece] for piece in pieces] == list(range(len(pieces)))
    added = backend.get_added_tokens_decoder().values()
    types = types | {
        token.content: TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        for token in added
        if token.content not in types
    }
    metadata = {"tokens": pieces, "token_type": [int(types.get(piece, TokenType.NORMAL)) for piece in pieces]}
    return {KEY + key: value for key, value in (metadata | more).items()}


@cache
def byte_level_pair(pre: str, folder: Path) -> tuple[OurTokenizer, OurTokenizer]:
    special, adds_bos = FAMILIES[pre]
    backend = Backend(models.BPE(ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = REFERENCES[pre]()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(PLAIN, normalized=False)])
    bos, eos = special[0], special[min(1, len(special) - 1)]
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    (folder / pre).mkdir()
    backend.save(str(folder / pre / "tokenizer.json"))
    (folder / pre / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    merges = json.loads(backend.to_str())["model"]["merges"]
    assert len(merges) > 500
    ids = {f"{name}_token_id": backend.token_to_id(token) for name, token in (("bos", bos), ("eos", eos))}
    metadata = converted(backend, {}, model="gpt2", pre=pre, merges=[" ".join(merge) for merge in merges], **ids)
    return Tokenizer.from_folder(folder / pre), Tokenizer.from_gguf(metadata, pre)


@cache
def spm_pair(prefix: bool, folder: Path) -> tuple[OurTokenizer, OurTokenizer]:
    """SentencePiece's BPE: tokenizer.json by transformers' rule for merges and Llama 2's normalizer, and the scores."""
    convert = import_oracle("transformers.convert_slow_tokenizer")
    metadata = CASES["sentencepiece"]["metadata"]
    pieces, scores, kinds = (metadata[KEY + key] for key in ("tokens", "scores", "token_type"))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    normal = {
        piece: score for piece, score, kind in zip(pieces, scores, kinds, strict=True) if kind == TokenType.NORMAL
    }
    merges = convert.generate_merges({piece: vocab[piece] for piece in normal}, normal)
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)] if prefix else decode)
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    backend.add_tokens([AddedToken("<|user|>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", vocab["<s>"])])
    path = folder / f"spm-{prefix}"
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    written = metadata | ({} if prefix else {KEY + "add_space_prefix": False})
    return Tokenizer.from_folder(path), Tokenizer.from_gguf(written, "spm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def same(pair: tuple[OurTokenizer, OurTokenizer], text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ours, theirs = pair
    for special in (False, True):
        ids = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special) == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def fuzzed(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of `text` on generated ones, and on some that have everything in them."""
    for text in ("".join(AWKWARD), " ".join(AWKWARD), ENGLISH[:2000]):
        test = example(text=text)(test)
    return settings(deadline=None, max_examples=100)(given(text=TEXTS)(test))


@pytest.mark.parametrize("pre", FAMILIES)
@fuzzed
def test_byte_level_bpe(pre: str, folder: Path, text: str) -> None:
    same(byte_level_pair(pre, folder), text)


@pytest.mark.parametrize("prefix", [True, False])
@fuzzed
def test_sentencepiece_bpe(oracle: Oracle, prefix: bool, folder: Path, text: str) -> None:
    same(spm_pair(prefix, folder), text)


def test_the_families_do_differ(folder: Path) -> None:
    """The comparison would see a wrong pre-tokenizer: SmolLM cuts like Granite 3 and dbrx like Llama 3, nobody else."""
    cuts = {
        pre: tuple(byte_level_pair(pre, folder)[1]._backend.pre_tokenizer.pre_tokenize_str("It'S 12345 <<½ \n\n x"))
        for pre in FAMILIES
    }
    assert cuts["smollm"] == cuts["refact"] and cuts["dbrx"] == cuts["llama-bpe"]
    assert len(set(cuts.values())) == 5
    assert (
        byte_level_pair("llama-bpe", folder)[1].encode("a")[0] == byte_level_pair("llama-bpe", folder)[1].bos_token_id
    )
