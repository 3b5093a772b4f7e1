"""What an adapter_config.json of PEFT's says of each matrix: whether it is adapted, its rank and its scale; the rest refused."""

import math
import re

from dplora_jax.errors import InputError
from dplora_jax.models.family import MOST_NUMBER

# What PEFT can do and this program does not: {option: the values that mean "not used"}.
UNUSED = {
    "use_dora": (False, None), "bias": ("none",), "lora_bias": (False, None), "layer_replication": (None, []),
    "use_qalora": (False, None), "use_bdlora": (None, False), "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None,), "target_parameters": (None, []), "loftq_config": ({}, None), "megatron_config": (None,),
    "arrow_config": (None,), "kasa_config": (None,), "monteclora_config": (None,),
    # How A and B began does not matter, unless the base's own matrices were changed to make room (PiSSA, OLoRA, ...).
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip
# What is read, or changes no value of a finished adapter. `fan_in_fan_out` is one: PEFT itself corrects it by the matrix.
OTHERS = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out", "megatron_core", "qalora_group_size",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config", "ensure_weight_tying",
)  # fmt: skip
ANY_PARENT = r"(.*\.)?"  # before a name's end
MOST_PATTERNS = 1024


def _is_name(value):
    return isinstance(value, str)


def _is_rank(value):
    return type(value) is int and 1 <= value < MOST_NUMBER


def _is_alpha(value):
    return type(value) in (int, float) and abs(value) < MOST_NUMBER


# Options that hold one thing or a list of them, and what each must be; of a pattern before the layer's number, a plain name.
LISTS = {
    "target_modules": _is_name,
    "exclude_modules": _is_name,
    "layers_to_transform": lambda value: type(value) is int,
    "layers_pattern": lambda value: _is_name(value) and re.fullmatch(r"[\w.]*", value) is not None,
}


class PeftConfig:
    """The options of an adapter_config.json `document`; `path` is for messages. Raises InputError on what is not supported, by
    its name, and on options that PEFT of this version does not have either."""

    def __init__(self, path, document, heads):
        self._path, self._document = path, document
        if document.get("peft_type") != "LORA":
            raise InputError(f"{path}: peft_type={document.get('peft_type')!r} is not supported, only 'LORA'.")
        for option, value in document.items():
            unused = UNUSED.get(option, (None, False, {}, [], "") if option not in OTHERS else (value,))
            if not any(value is known or (type(value) is type(known) and value == known) for known in unused):
                raise InputError(f"{path}: the adapter uses {option}={value!r}, which is not supported.")
        # PEFT lists both of its usual names of a head for every classifier; which one it is, the tensors tell.
        named = document.get("modules_to_save") or []
        if not isinstance(named, list) or any(name not in heads for name in named):
            raise InputError(f"{path}: modules_to_save={named!r} is not supported, only the head.")
        rank, alpha = document.get("r"), document.get("lora_alpha")
        if not _is_rank(rank) or not _is_alpha(alpha):
            raise InputError(
                f"{path}: adapter_config.json has r={rank!r} and lora_alpha={alpha!r}, which make no adapter."
            )
        for option, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
            pattern = document.get(option) or {}
            if not isinstance(pattern, dict) or len(pattern) > MOST_PATTERNS or not all(map(fits, pattern.values())):
                raise InputError(f"{path}: {option}={pattern!r} must give a number for each of its modules.")
        for option, fits in LISTS.items():
            value = document.get(option)
            listed = value if isinstance(value, list) else [value]
            if value is not None and not (len(listed) <= MOST_PATTERNS and all(map(fits, listed))):
                raise InputError(f"{path}: {option}={value!r} must be one of its kind or a list of them.")
        self._matchers = {}
        self.rank, self.alpha, self.stabilised = rank, alpha, document.get("use_rslora") is True

    def scale(self, alpha, rank):
        """What B A is multiplied with: alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)."""
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank

    def module_scaling(self, module):
        """(rank, scale) of the matrix that PEFT calls `module`, by the first pattern that matches its name's end."""
        rank = self._by_pattern("rank_pattern", module, self.rank)
        return rank, self.scale(self._by_pattern("alpha_pattern", module, self.alpha), rank)

    def _by_pattern(self, option, module, default):
        pattern = self._document.get(option) or {}
        return next((value for key, value in pattern.items() if self._matches(key, module, ANY_PARENT)), default)

    def adapts(self, module):
        """Whether PEFT adapts `module`, by target_modules, exclude_modules and layers_to_transform."""
        chosen, excluded = self._document.get("target_modules"), self._document.get("exclude_modules")
        if excluded and self._selects(excluded, module):
            return False
        if chosen is None or chosen == "all-linear":
            return True
        if isinstance(chosen, str) or not self._selects(chosen, module):
            return self._selects(chosen, module)
        layers, patterns = self._document.get("layers_to_transform"), self._document.get("layers_pattern") or []
        if layers is None or layers == []:
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns
        patterns = [rf"(?:^|.*?\.){pattern}\." for pattern in patterns] or [r".*?\.[^.]*\."]
        matches = (re.match(rf"{pattern}(\d+)\.", module) for pattern in patterns)
        index = next((int(match[match.lastindex]) for match in matches if match), None)
        return index in (layers if isinstance(layers, list) else [layers])

    def _selects(self, names, module):
        if isinstance(names, str):
            return self._matches(names, module)
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _matches(self, pattern, module, before=""):
        """Whether the regular expression, with that of `before` it, matches the whole name."""
        if (before, pattern) not in self._matchers:
            try:
                self._matchers[before, pattern] = _matcher(before, pattern)
            except (re.error, ValueError, OverflowError, RecursionError):
                raise InputError(
                    f"{self._path}: {pattern!r} in adapter_config.json is not a regular expression that this program "
                    "reads: only those of "
                    "RE2 are, without look-ahead and back-references."
                ) from None
        return self._matchers[before, pattern](module)


def _matcher(before, pattern):
    """A function that says whether `pattern` behind `before` matches the whole of a name. Python's `re` takes time that is
    exponential in the name's length on patterns such as (a|a)*b, which a file may hold; RE2 does not, but costs more a call."""
    re.compile(pattern)
    if not re.search(r"[*+?{(|]", pattern):
        return re.compile(before + pattern).fullmatch
    import pyarrow
    from pyarrow import compute

    def matches(name):
        return compute.match_substring_regex(pyarrow.scalar(name), f"^{before}(?:{pattern})$").as_py()

    matches("")  # raises where RE2 does not know the pattern
    return matches
