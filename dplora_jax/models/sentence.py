"""What the files of a sentence-transformers model say beside the transformer's own: pooling, lower case, prompts."""

from dplora_jax.errors import InputError
from dplora_jax.files import find, inside, read_json

# Before 5.4 a 1_Pooling/config.json had a switch for each mode; since then one name, or a list of names that are joined.
SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Where a Transformer module keeps its own options; the first that is there counts.
OWN_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


def pooling_modes(document):
    """The modes that a 1_Pooling/config.json names, as sentence-transformers reads it: `pooling_mode` wins over the switches,
    and a file with neither means the mean."""
    named = document.get("pooling_mode") or [mode for switch, mode in SWITCHES.items() if document.get(switch) is True]
    return [str(mode) for mode in named] if isinstance(named, list) and named else [str(named or "mean")]


def lower_cases(directory):
    """Whether a sentence model of `directory` lower-cases its texts before the tokenizer sees them."""
    if find(directory, "modules.json") is None:
        return False
    config_path = next(filter(None, (find(directory, name) for name in OWN_CONFIGS)), None)
    return config_path is not None and read_json(config_path).get("do_lower_case") is True


def refuse_prompt(directory):
    """Raise InputError where sentence-transformers would put a prompt before every text, which is not done here."""
    path = find(directory, "config_sentence_transformers.json")
    document = read_json(path) if path else {}
    name, prompts = document.get("default_prompt_name"), document.get("prompts")
    if name is not None and not (isinstance(prompts, dict) and prompts.get(str(name)) == ""):
        raise InputError(
            f"{path}: default_prompt_name={name!r} puts a prompt before every text, which is not supported: set it to null, "
            "and write the prompt into the texts where it is wanted."
        )


def pooling(directory):
    """(pooling, normalize) that a sentence-transformers `modules.json` asks for; (None, False) where there is none."""
    if find(directory, "modules.json") is None:
        return None, False
    refuse_prompt(directory)
    how, normalize = None, False
    for module in read_json(directory / "modules.json", list):
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise InputError(f"{directory}/modules.json: {module!r} is not a module with a type.")
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            modes = pooling_modes(read_json(inside(directory, module.get("path"), "config.json")))
            if modes != ["mean"]:
                raise InputError(
                    f"{directory / module['path']}: only mean pooling is supported, not {', '.join(modes)}."
                )
            how = "mean"
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise InputError(f"{directory}/modules.json: a {kind} module is not supported.")
    return how, normalize
