"""Small GGUF files, written as llama.cpp's converter writes them, their blocks decoded plainly, and their tokenizers."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HEADS, KV_HEADS, HEAD, WIDTH, MLP, WORDS, LAYERS = 4, 2, 8, 32, 64, 12, 2
SIZES = {
    "block_count": LAYERS, "embedding_length": WIDTH, "feed_forward_length": MLP, "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS, "context_length": 128, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


TENSORS = {
    "token_embd.weight": normal(WORDS, WIDTH),
    "output_norm.weight": normal(WIDTH),
    **{f"blk.{i}.{norm}.weight": normal(WIDTH) for i in range(LAYERS) for norm in ("attn_norm", "ffn_norm")},
    **{
        f"blk.{i}.{name}.weight": normal(*shape)
        for i in range(LAYERS)
        for name, shape in {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (KV_HEADS * HEAD, WIDTH),
            "attn_v": (KV_HEADS * HEAD, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (MLP, WIDTH),
            "ffn_up": (MLP, WIDTH),
            "ffn_down": (WIDTH, MLP),
        }.items()
    },
}


def write(path, tensors=None, architecture="llama", **metadata):
    """A GGUF file: `tensors` {llama.cpp's name: array or (bytes, type)}, and metadata {key: value or None for none}; a
    size's key is below the architecture's."""
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {name: metadata.pop(name, value) for name, value in SIZES.items()}
    for key, value in {**{f"{architecture}.{name}": v for name, v in sizes.items()}, **metadata}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, value in (TENSORS if tensors is None else tensors).items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Each kind of block, decoded number by number from its layout.
def half(two_bytes):
    return float(two_bytes.view(np.float16)[0])


def q8_0(block):
    return [half(block[:2]) * int(q) for q in block[2:].view(np.int8)]


def q4_0(block):
    nibbles = [int(q) & 15 for q in block[2:]] + [int(q) >> 4 for q in block[2:]]
    return [half(block[:2]) * (q - 8) for q in nibbles]


def q4_1(block):
    nibbles = [int(q) & 15 for q in block[4:]] + [int(q) >> 4 for q in block[4:]]
    return [half(block[:2]) * q + half(block[2:4]) for q in nibbles]


def fifths(block, at):
    """The 5-bit numbers of a block: nibbles behind four bytes of high bits at `at`."""
    high = int.from_bytes(block[at : at + 4].tobytes(), "little")
    nibbles = [int(q) & 15 for q in block[at + 4 :]] + [int(q) >> 4 for q in block[at + 4 :]]
    return [q | (high >> i & 1) << 4 for i, q in enumerate(nibbles)]


def q5_0(block):
    return [half(block[:2]) * (q - 16) for q in fifths(block, 2)]


def q5_1(block):
    return [half(block[:2]) * q + half(block[2:4]) for q in fifths(block, 4)]


def iq4_nl(block):
    table = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    return [half(block[:2]) * table[q] for q in [int(q) & 15 for q in block[2:]] + [int(q) >> 4 for q in block[2:]]]


def q4_k(block):
    """Eight groups of 32, each with a 6-bit scale and a 6-bit minimum, packed in 12 bytes."""
    s, quarters = [int(b) for b in block[4:16]], block[16:].reshape(4, 32)
    values = []
    for group in range(8):
        if group < 4:
            scale, minimum = s[group] & 63, s[group + 4] & 63
        else:
            scale = s[group + 4] & 15 | s[group - 4] >> 6 << 4
            minimum = s[group + 4] >> 4 | s[group] >> 6 << 4
        shift = 4 * (group % 2)
        bits = [int(q) >> shift & 15 for q in quarters[group // 2]]
        values += [half(block[:2]) * scale * q - half(block[2:4]) * minimum for q in bits]
    return values


def q6_k(block):
    """Sixteen groups of 16 with an 8-bit scale; four bits of a value here, two there, in two halves of 128."""
    scales, values = block[192:208].view(np.int8), []
    for n in range(2):
        low, high = block[64 * n : 64 * n + 64], block[128 + 32 * n : 160 + 32 * n]
        for quarter in range(4):
            for i in range(32):
                nibble = int(low[i + 32 * (quarter % 2)]) >> 4 * (quarter // 2) & 15
                q = (nibble | (int(high[i]) >> 2 * quarter & 3) << 4) - 32
                values.append(half(block[208:]) * int(scales[8 * n + 2 * quarter + i // 16]) * q)
    return values


def random_blocks(rows, kind):
    """[rows, bytes] of two valid blocks a row, each with small scales."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = RNG.integers(0, 256, (rows, 2, size), dtype=np.uint8)
    at = {Type.Q4_K: slice(0, 4), Type.IQ4_NL: slice(0, 2)}.get(kind, slice(208, 210))
    count = (at.stop - at.start) // 2
    blocks[..., at] = RNG.uniform(0.01, 0.1, (rows, 2, count)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


PLAIN = {
    Type.Q8_0: q8_0, Type.Q4_0: q4_0, Type.Q4_1: q4_1, Type.Q5_0: q5_0, Type.Q5_1: q5_1, Type.Q4_K: q4_k, Type.Q6_K: q6_k,
    Type.IQ4_NL: iq4_nl,
}  # fmt: skip


# The tokenizers: all bytes in GPT-2's spelling, three merges of digits, a word that no merge makes, special tokens; and a
# SentencePiece with {piece: score}.
BYTES = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255 else None for b in range(256)]
BYTES = [c or chr(256 + [i for i, c in enumerate(BYTES) if c is None].index(b)) for b, c in enumerate(BYTES)]
EXTRA = ["12", "123", "1234", "zq", "<|end|>", "<think>", "<|pad|>"]
BYTE_LEVEL = {
    "model": "gpt2", "pre": "gpt-2", "tokens": [*BYTES, *EXTRA], "token_type": [1] * 260 + [3, 4, 3],
    "merges": ["1 2", "12 3", "123 4"], "bos_token_id": 260, "eos_token_id": 260, "padding_token_id": 262,
}  # fmt: skip
PIECES = {
    "▁": -1, "a": -2, "b": -3, "c": -4, "<": -5, "s": -6, ">": -7, "s>": -8, "ab": -20, "▁a": -21, "abc": -22, "bc": -23,
    "▁ab": -24, "ca": -25, "▁▁": -26, "cab": -27, "▁b": -28,
}  # fmt: skip
SENTENCEPIECE = {
    "model": "llama", "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES],
    "scores": [0.0, 0.0, 0.0] + [0.0] * 256 + [float(score) for score in PIECES.values()],
    "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
}  # fmt: skip
TEXTS = [
    "Rates rose 1234.5% in 2024's Q1", "  two  spaces\tand tabs \n\n\n new lines \r\n", "naïve Ω 中文 日本語 עברית हिन्दी",
    "🙂👩‍👩‍👧🇫🇷", "it's WE'LL don't , . ! ?", " ", "\x00\x7f\u200d\ufffd", "ab cab abc",
]  # fmt: skip
