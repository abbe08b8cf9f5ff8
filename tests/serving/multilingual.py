"""Prompts in many scripts, and tokenizers of every kind that models of ours have."""
# ruff: noqa: RUF001  # ambiguous characters are what this is about

from __future__ import annotations

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from quire.checkpoints.tokenizer import Tokenizer as Wrapped

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Zażółć gęślą jaźń; naïve café, Ærøskøbing, ß, ﬁ, İstanbul ıİ",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "জীবনকে যাপন করো, ক্ষুধা ও জ্ঞান",
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல்",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า น้ำ กำ",
    "ከመጠምጠም መማር ይቅደም",
    "視野無限廣，窗外有藍天。𠮷野家 𪚥",
    "いろはにほへと ちりぬるを カタカナ ｶﾀｶﾅ か\u3099",
    "키스의 고유조건은 입술끼리 만나야 하고 각",
    "Tiếng Việt có dấu: Ngoằn ngoèo ế ệ e\u0302\u0323",
    "😀😃🥹 🫠 ❤️ ☺︎ ☺️",
    "👩‍👩‍👧‍👦 👨🏽‍🚀 🏳️‍🌈 🏴‍☠️ 👍🏿 🤷🏻‍♀️",
    "🇩🇪🇫🇷🇯🇵🇧🇷 1️⃣ #️⃣ *️⃣ 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "Z̸̢̛͓a̷͉̍l̶̨̛g̴͎̈ȏ̵̝ t̴e̶x̷t̸",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕄𝕒𝕥𝕙 𝟘𝟙𝟚 ∮ E⋅da = Q, ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋",
    "left \u202bימין\u202c left \u200f\u200e \u2066iso\u2069",
    "\ufeffbom nul\x00 bell\x07 del\x7f nbsp\u00a0 nnbsp\u202f zwsp\u200b ls\u2028 ps\u2029",
    "  two before, three inside   and two after  ",
    "tabs\tand\r\nlines\n\n\n  indented\n\ttabbed \n",
    "\ufffd \ufffd\ufffd real replacement characters \ufffd",
    "def f(x): return '▁' + \"Ġ\" + '##' + '</w>' + '<0xE4>'",
    "مرحبا 你好 שלום नमस्ते 안녕 👋🏽 hello",
    " ",
    "\n",
    "é",
)


def _train(tokenizer: Tokenizer, size: int, **more: object) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False, **more
    )
    tokenizer.train_from_iterator(PROMPTS * 2, trainer)
    return tokenizer


def _byte_level(size: int, *, prefix_space: bool = False, nfc: bool = False) -> Tokenizer:
    """GPT-2, Llama 3, Qwen: tokens are runs of bytes, and end in the middle of characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    return _train(backend, size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _bytes_across_words() -> Tokenizer:
    """Tokens that hold the end of one character and the beginning of the next."""
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    backend.decoder = decoders.ByteLevel()
    return _train(backend, 700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _fallback_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Sentencepiece's kind: pieces of text, and a token for each byte of what has none."""
    pieces = ["▁", "a", "e", "o", "n", "t", "é", "你", "好", "▁a", "▁t", "▁▁", "नम", "न", "म", "\n"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {piece: 259 + i for i, piece in enumerate(pieces)}
    return vocabulary, [("▁", "a"), ("▁", "t"), ("▁", "▁"), ("न", "म")]


def _byte_fallback(*, strip: bool, prepend: bool) -> Tokenizer:
    """Llama 2 and Mistral strip the blank that they prepend; Gemma does neither."""
    vocabulary, merges = _fallback_vocabulary()
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    steps = [normalizers.Prepend("▁")] if prepend else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def _metaspace(scheme: str) -> Tokenizer:
    """Pieces without bytes to fall back on; the decoder turns marks into spaces and joins."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(PROMPTS * 2, trainer)
    return backend


MAKERS = {
    "byte-level": lambda: _byte_level(700),
    "byte-level-bytes-only": lambda: _byte_level(260),
    "byte-level-prefix-space": lambda: _byte_level(500, prefix_space=True),
    "byte-level-nfc": lambda: _byte_level(500, nfc=True),
    "byte-level-across-words": _bytes_across_words,
    "byte-fallback-strip": lambda: _byte_fallback(strip=True, prepend=True),
    "byte-fallback-plain": lambda: _byte_fallback(strip=False, prepend=False),
    "metaspace-always": lambda: _metaspace("always"),
    "metaspace-never": lambda: _metaspace("never"),
}


@cache
def tokenizer(kind: str) -> Wrapped:
    return Wrapped(MAKERS[kind](), {"bos_token": "<s>", "eos_token": "</s>"})
