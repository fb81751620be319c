"""Options and values that are known but not built yet, each with the work that brings it.

They fail as "not built yet", never as a typo. A key set to what it means when it is off passes in silence, so
that a config carries over. Work that lands takes its lines out of here and into a slice.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Later:
    """A key whose work has not landed."""

    work: str
    """What brings it, in words."""

    off: tuple[object, ...] = ()
    """Values that ask for nothing, and so are accepted."""


_KLEIN = "the klein flavours"
_OTHER_ADAPTERS = "DoRA, LoKr and LoHa adapters"
_CONVERTED_STARTS = "initialisations that change the base"
_FORMATS = "export for other programs"
_HUB = "publishing to the Hub"
_PROCESSES = "training on several GPUs"
_CUDA_GRAPHS = "compiled blocks in CUDA graphs"
_CONDITIONS = "conditioning on other pictures"
_SCHEDULED_SETS = "sets that are active for part of a run"
_CACHING = "caches filled while training"
_S3 = "S3 stores"
_CSV = "CSV lists of addresses"
_HF_DATASETS = "Hub datasets"
_PARQUET = "captions from tables"

LATER_OPTIONS: dict[str, Later] = {
    "init_lora_step": Later("continuing the step count of a saved adapter"),
    "use_dora": Later(_OTHER_ADAPTERS, (False,)),
    "input_perturbation": Later("input perturbation", (0, 0.0)),
    "input_perturbation_steps": Later("input perturbation", (0,)),
    "attention_mechanism": Later("other attention kernels", ("native",)),
    "masked_loss_probability": Later(_CONDITIONS, (1, 1.0)),
    "push_to_hub": Later(_HUB, (False,)),
    "push_checkpoints_to_hub": Later(_HUB, (False,)),
    "hub_model_id": Later(_HUB),
    "model_card_private": Later(_HUB, (True,)),
    "webhook_config": Later("posts to Discord and other addresses"),
    "num_processes": Later(_PROCESSES, (1,)),
    "num_machines": Later(_PROCESSES, (1,)),
    "machine_rank": Later(_PROCESSES, (0,)),
    "main_process_ip": Later(_PROCESSES, ("127.0.0.1",)),
    "main_process_port": Later(_PROCESSES, (29500,)),
    "fsdp_enable": Later(_PROCESSES, (False,)),
    "fsdp_reshard_after_forward": Later(_PROCESSES, (True,)),
    "fsdp_cpu_offload": Later(_PROCESSES, (False,)),
    "fsdp_state_dict_type": Later(_PROCESSES, ("SHARDED_STATE_DICT",)),
    "deepspeed_config": Later(_PROCESSES),
}
"""Keys of a run."""

OPTION_VALUES: dict[str, dict[str, str]] = {
    "model_flavour": {"klein-9b": _KLEIN, "klein-4b": _KLEIN},
    "lora_type": dict.fromkeys(("dora", "lokr", "loha"), _OTHER_ADAPTERS),
    "lora_init_type": dict.fromkeys(("pissa", "olora", "loftq"), _CONVERTED_STARTS),
    "lora_format": dict.fromkeys(("comfyui", "bfl", "kohya"), _FORMATS),
    "dynamo_mode": dict.fromkeys(("reduce-overhead", "max-autotune"), _CUDA_GRAPHS),
}
"""Values of options that exist."""

SET_KEYS: dict[str, Later] = {
    "start_step": Later(_SCHEDULED_SETS, (0,)),
    "end_step": Later(_SCHEDULED_SETS),
    "start_epoch": Later(_SCHEDULED_SETS, (0, 1)),
    "end_epoch": Later(_SCHEDULED_SETS),
    "caption_shuffle": Later("shuffled captions", (False, {}, {"enable": False})),
    "conditioning_data": Later(_CONDITIONS),
    "conditioning_type": Later(_CONDITIONS),
    "conditioning_required": Later(_CONDITIONS, (False,)),
    "is_regularisation_data": Later("regularisation sets", (False,)),
    "timestep_sampling_offset": Later("a noise level offset of a set", (0, 0.0)),
    "image_embeds": Later("stores for latents"),
    "vae_cache_clear_each_epoch": Later(_CACHING, (False,)),
    "vae_cache_ondemand": Later(_CACHING, (False,)),
    "vae_cache_disable": Later(_CACHING, (False,)),
    "text_cache_ondemand": Later(_CACHING, (False,)),
    "parquet": Later(_PARQUET),
    **dict.fromkeys(
        (
            "aws_bucket_name",
            "aws_data_prefix",
            "aws_endpoint_url",
            "aws_region_name",
            "aws_access_key_id",
            "aws_secret_access_key",
        ),
        Later(_S3),
    ),
    **dict.fromkeys(("csv_file", "csv_url_column", "csv_caption_column", "csv_cache_dir"), Later(_CSV)),
    **dict.fromkeys(
        ("dataset_name", "split", "revision", "image_column", "caption_column", "streaming"),
        Later(_HF_DATASETS),
    ),
}
"""Keys of an image set."""

_TYPES = {"aws": _S3, "csv": _CSV, "huggingface": _HF_DATASETS}

SET_VALUES: dict[str, dict[str, str]] = {
    "type": _TYPES,
    "crop_style": {"face": "crops that follow a face"},
    "caption_strategy": {"parquet": _PARQUET, "csv": _CSV, "huggingface": _HF_DATASETS},
    "metadata_backend": {"parquet": _PARQUET, "huggingface": _HF_DATASETS},
}
"""Values of the keys of an image set."""

LATER_DATASET_TYPES: dict[str, str] = {"conditioning": _CONDITIONS, "image_embeds": "stores for latents"}
"""Values of `dataset_type`."""

STORE_KEYS: dict[str, Later] = {
    "caption_filter_list": Later("filtered captions"),
    **{key: later for key, later in SET_KEYS.items() if key.startswith("aws_")},
}
"""Keys of a text store."""

STORE_VALUES: dict[str, dict[str, str]] = {"type": _TYPES}
"""Values of the keys of a text store."""


def is_off(value: object, later: Later) -> bool:
    """Whether `value` asks for nothing. false is not 0 here."""
    return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in later.off)


def work_for(values: dict[str, dict[str, str]], key: str, value: object) -> str | None:
    """The work that brings `value` of `key`, or None where it is not a value to come."""
    if not isinstance(value, str):
        return None
    return values.get(key, {}).get(value)
