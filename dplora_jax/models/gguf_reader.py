"""The header of a GGUF file as Python values, read within bounds: it comes from whoever made the file.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# A file may be sparse, so that its length bounds nothing. A vocabulary of 256,000 tokens with its merges takes about 20 MiB.
MOST_BYTES = 128 << 20
MOST_ITEMS = 2**22  # keys, tensors and arrays' items, each a Python object


class Reader:
    """Reads `content` (bytes, or a map of a file) from byte `at` on.

    Raises struct.error, ValueError or KeyError where the header breaks off, contradicts itself or is beyond the bounds.
    """

    def __init__(self, content, at):
        self.content, self.at, self._items = content, at, 0

    def unpack(self, form):
        """The numbers that `form` (of struct) names."""
        size = struct.calcsize("<" + form)
        if self.at + size > MOST_BYTES:
            raise ValueError("the header is too long")
        values = struct.unpack_from("<" + form, self.content, self.at)
        self.at += size
        return values

    def value(self, kind):
        """A value of GGUF's type number `kind`."""
        if kind == STRING:
            (length,) = self.unpack("Q")
            return self.unpack(f"{length}s")[0].decode()
        if kind != ARRAY:
            return self.unpack(SCALARS[kind])[0]
        kind, length = self.unpack("IQ")
        self._count(length)
        if kind == STRING:
            return [self.value(STRING) for _ in range(length)]
        return list(self.unpack(f"{length}{SCALARS[kind]}"))

    def metadata(self, count):
        """{key: value} of `count` keys."""
        return self._named(count, lambda: self.value(*self.unpack("I")))

    def tensors(self, count):
        """{name: (shape, type number, offset)} of `count` tensors."""
        return self._named(count, self._tensor)

    def _tensor(self):
        dims = self.unpack("I")[0]
        return tuple(reversed(self.unpack(f"{dims}Q"))), *self.unpack("IQ")

    def _named(self, count, read):
        self._count(count)
        metadata = {}
        for _ in range(count):
            name = self.value(STRING)
            if name in metadata:
                raise ValueError(f"{name} is there twice")
            metadata[name] = read()
        return metadata

    def _count(self, items):
        self._items += items
        if self._items > MOST_ITEMS:
            raise ValueError("the header has too many items")
