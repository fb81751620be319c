"""Known keys and values that are not options of this program, each with the message for a config that has them.

There is one table for the run's options and one for each kind of dataset entry. Most names are those of SimpleTuner
(4.x), grouped by feature, so that its configs carry over: a value that turns a feature off is accepted, a key that
cannot change the result gets a notice, and everything else is rejected with a remedy. Whoever implements a feature
moves its names from here to a slice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from simpletuner.config.precisions import PRECISIONS_ELSEWHERE
from simpletuner.config.values import join_names


@dataclass(frozen=True)
class OtherKey:
    """A known key that is not an option, or a known value that an option does not accept."""

    meaning: str
    """Why it is rejected; for an ignored key, why it has no effect."""

    remedy: str = ""

    off: tuple[object, ...] = ()
    """Values that request nothing; they are accepted without a notice. null and the empty string always are."""

    is_ignored: bool = False
    """Whether all other values are accepted too, with a notice."""

    def passes(self, value: object) -> bool:
        """Whether `value` requests nothing. Distinguishes false from 0."""
        return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in (None, "", *self.off))


@dataclass(frozen=True)
class OtherKeys:
    """All known keys that are not options, for a config or for a kind of dataset entry."""

    keys: Mapping[str, OtherKey] = field(default_factory=dict)
    prefixes: Mapping[str, OtherKey] = field(default_factory=dict)
    """Entries for all keys of a feature, by their common prefix."""

    values: Mapping[str, Mapping[str, OtherKey]] = field(default_factory=dict)
    """Known values that an option does not accept, by option."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of options with the same meaning; accepted with a notice."""

    nicknames: Mapping[str, str] = field(default_factory=dict)
    """Names that other programs use for an option; suggested, not accepted."""

    def of(self, name: str) -> OtherKey | None:
        """The entry for a key; None if it is unknown."""
        if name in self.keys:
            return self.keys[name]
        return next((key for prefix, key in self.prefixes.items() if name.startswith(prefix)), None)

    def of_value(self, name: str, value: object) -> OtherKey | None:
        """The entry for a value of an option; None if there is none."""
        return self.values.get(name, {}).get(value) if isinstance(value, str) else None


NO_OTHER_KEYS = OtherKeys()

NOT_YET = "not built yet: "


def _later(work: str, *off: object) -> OtherKey:
    return OtherKey(NOT_YET + work, "Leave it out until then.", off)


def _refused(reason: str, *off: object, remedy: str = "") -> OtherKey:
    return OtherKey(reason, f"Remove it{remedy}.", off)


def _ignored(reason: str, *off: object) -> OtherKey:
    return OtherKey(reason, off=off, is_ignored=True)


def _value(reason: str, *instead: str) -> OtherKey:
    return OtherKey(reason, f"Use {join_names(instead)}.")


def _named(*rows: tuple[OtherKey, str]) -> dict[str, OtherKey]:
    """A mapping with one entry for each of the space-separated names in each row."""
    return {name: key for key, names in rows for name in names.split()}


_ADAPTERS = "DoRA, LoKr, LoHa and OFT adapters"
_CACHING = "caches filled while training"
_CSV = "CSV lists of URLs"
_HF_DATASETS = "Hub datasets"
_HUB = "publishing to the Hub"
_PARQUET = "captions from tables"
_S3 = "S3 stores"

LATER_OPTIONS: Mapping[str, OtherKey] = _named(
    (_later("continuing the step count of a saved adapter"), "init_lora_step"),
    (_later(_ADAPTERS, False), "use_dora lokr_full_matrix"),
    (_later(_ADAPTERS, -1), "lokr_factor"),
    (_later(_ADAPTERS, 32), "oft_block_size"),
    (_later(_ADAPTERS, 5), "oft_neumann_terms"),
    (_later(_ADAPTERS), "init_lokr_norm"),
    (_later("rank-stabilized scaling", "standard"), "lora_scaling"),
    (_later("other ranks for some layers"), "lora_rank_pattern"),
    (_later("input perturbation", 0, 0.0), "input_perturbation"),
    (_later("input perturbation", 0), "input_perturbation_steps"),
    (_later("other attention kernels", "auto", "native", "diffusers"), "attention_mechanism"),
    (_later("other modes of activation checkpointing", "auto", "full"), "gradient_checkpointing_mode"),
    (_later(_HUB, False), "push_to_hub push_checkpoints_to_hub"),
    (_later(_HUB), "publishing_config"),
    (_later("webhooks, such as posts to Discord"), "webhook_config"),
    (
        OtherKey(
            NOT_YET + "configs of accelerate",
            "Give --num_processes, and --fsdp_enable or --deepspeed_config=zero2 to shard over the processes.",
        ),
        "accelerate_config accelerate_extra_args",
    ),
    (_later(_CACHING, False), "vae_cache_ondemand vae_cache_disable text_cache_ondemand text_cache_disable"),
    (_later(_PARQUET), "parquet_caption_column parquet_filename_column"),
)
"""Options whose feature is not implemented yet."""

_NOISE_MODELS = "this is for models that predict noise, and FLUX.2 is trained with flow matching"
_NO_LOSS = "this auxiliary loss is not supported"
_NO_RAM_TORCH = "this way of keeping weights in RAM is not supported"
_STREAM = ", or offload the blocks with enable_group_offload"
_NO_DELETING = "a run never deletes files of a dataset"
_UNUSABLE = ": unusable images are left out, counted and listed"
_NO_JUDGING = "a run does not check the content of images"
_NO_SCRIPTS = "a run does not start scripts"
_FOLLOW = ": your own script can follow events.jsonl in the run directory"
_PER_SET = "each dataset has its own value"
_TO_SETS = " of the config, and set it in each image set in multidatabackend.json"
_NO_EVALUATION = "images are not scored"
_TO_EVAL = ": instead, the loss is measured on datasets with dataset_type eval"

_REFUSED_OPTIONS: Mapping[str, OtherKey] = _named(
    # Trainable parameters
    (_refused("this program trains no ControlNets", False, remedy=" to train a LoRA or the whole model"), "controlnet"),
    (_refused("this program trains no LoRAs that widen the model's input", False), "control"),
    (_refused("this program does not train the text encoder", False), "train_text_encoder"),
    (_refused("model_type and flux_lora_target select the trainable parameters", "none"), "layer_freeze_strategy"),
    (_refused("SingLoRA is not supported", "standard"), "peft_lora_mode"),
    (_refused("this program trains no slider LoRAs", False), "slider_lora_target"),
    (_refused("assistant LoRAs on the base model are not supported"), "assistant_lora_path"),
    (_refused("distillation is not supported", "none"), "distillation_method"),
    (_refused("the moving average starts from init_lora"), "init_lora_ema"),
    # The loss
    (
        _refused(_NO_LOSS, False),
        "crepa_enabled irepa_enabled urepa_enabled layersync_enabled nextlat_enabled mixflow_enabled twinflow_enabled "
        "internal_guidance_enabled xm_enabled",
    ),
    (_refused("this is not supported"), "diffusion_blocks_config sla_config"),
    (_refused(_NOISE_MODELS, False), "diff2flow_enabled offset_noise refiner_training rescale_betas_zero_snr"),
    (_refused(_NOISE_MODELS, False), "use_soft_min_snr"),
    (_refused(_NOISE_MODELS, 0, 0.0), "snr_gamma"),
    (
        _refused(_NOISE_MODELS, "none", remedy=": flow_schedule_shift and flow_custom_timesteps select timesteps"),
        "timestep_bias_strategy",
    ),
    (_refused("FLUX.2 predicts the velocity", "flow_matching"), "prediction_type"),
    (
        _refused("this distribution of timesteps is not supported", remedy=", or list them in flow_custom_timesteps"),
        "flow_timesteps_mode flow_cubic_schedule_weights",
    ),
    # The optimizer
    (_refused("the moving average is updated from the first step", 0), "ema_warmup_steps"),
    (_refused("prodigy estimates its learning rate during the whole run", 0), "prodigy_steps"),
    (_refused("the optimizer state stays on the accelerator", "none"), "optimizer_cpu_offload_method"),
    (_refused("gradients stay on the accelerator", False), "optimizer_offload_gradients"),
    (
        _refused("it is an argument of the optimizer", False, remedy=", or give --optimizer_config fused=true"),
        "fuse_optimizer",
    ),
    # Memory
    (
        _refused(_NO_RAM_TORCH, False, remedy=_STREAM),
        "ramtorch ramtorch_controlnet ramtorch_text_encoder ramtorch_vae",
    ),
    (_refused("swapping a number of blocks is not supported", 0, remedy=_STREAM), "musubi_blocks_to_swap"),
    (_refused("quantized activations are not supported", False), "quantize_activations"),
    (_refused("base_model_precision sets the whole format", {}), "quantization_config"),
    (
        _refused("only torch's own checkpointing is supported", "torch", remedy=", or give --activation_offload=true"),
        "gradient_checkpointing_backend",
    ),
    (
        _refused("only whole blocks are offloaded", False, remedy=", or give --activation_offload=true"),
        "gradient_checkpointing_offload_attention",
    ),
    (
        _refused("each block is recomputed separately", 0, 1, remedy=", or set gradient_checkpointing_interval"),
        "gradient_checkpointing_segment_stride",
    ),
    (
        _refused("context parallelism is not supported", 1, remedy=", or give --activation_offload=true"),
        "context_parallel_size",
    ),
    # Validation
    (_refused("guidance rescaling is not supported", 0, 0.0), "validation_guidance_rescale"),
    (_refused("skip-layer guidance is not supported", []), "validation_guidance_skip_layers"),
    (_refused("validation images use the adapter at full strength", 1, 1.0), "validation_lycoris_strength"),
    (_refused("validation images use only the trained adapter"), "validation_adapter_path"),
    (_refused("validation images use only the trained adapter", {}), "validation_adapter_config"),
    (_refused("a run generates its validation images itself", "simpletuner-local"), "validation_method"),
    (
        _refused("validation images use the Euler solver", "euler", "flow_matching", "same"),
        "validation_noise_scheduler",
    ),
    (_refused("previews of unfinished validation images are not supported", False), "validation_preview"),
    (_refused("validation images keep their seed, so that they can be compared", False), "validation_randomize"),
    (_refused("validation images are generated uncompiled", False), "validation_torch_compile"),
    (
        _refused("validation images are generated from prompts", False, remedy=", and give --validation_prompt"),
        "validation_using_datasets",
    ),
    (
        _refused("validation images are generated from prompts", remedy=", and give --validation_prompt"),
        "validation_input",
    ),
    (
        _refused("validation begins after the first interval", 0),
        "validate_after_step validate_after_epoch",
    ),
    (_refused(_NO_EVALUATION, "none", remedy=_TO_EVAL), "evaluation_type"),
    (
        _refused("the held-out loss is measured by steps", 0, remedy=", or give eval_steps_interval"),
        "eval_epoch_interval",
    ),
    (
        _refused("the loss of eval sets is always measured", False, remedy=", and the sets with dataset_type eval"),
        "eval_loss_disable",
    ),
    # Data
    (
        _refused(
            "each sample uses the references of all its conditioning sets", "combined", remedy=" to train with all"
        ),
        "conditioning_multidataset_sampling",
    ),
    (
        _refused(
            "an epoch uses each image of each dataset",
            "auto-weighting",
            remedy=", and weight datasets by their repeats",
        ),
        "data_backend_sampling",
    ),
    (_refused(_PER_SET, 1024, 1024.0, remedy=_TO_SETS), "resolution"),
    (_refused(_PER_SET, "pixel_area", remedy=_TO_SETS), "resolution_type"),
    (_refused(_PER_SET, "filename", remedy=_TO_SETS), "caption_strategy"),
    (_refused(_PER_SET, remedy=_TO_SETS), "instance_prompt cache_dir_vae"),
    (
        _refused(_PER_SET, remedy=" of the config, and set cache_dir of the text store in multidatabackend.json"),
        "cache_dir_text",
    ),
    (
        _refused(_PER_SET, 0, 0.0, remedy=_TO_SETS),
        "minimum_image_size maximum_image_size target_downsample_size",
    ),
    (_refused(_PER_SET, remedy=_TO_SETS), "max_upscale_threshold"),
    (
        _refused(_PER_SET, False, remedy=_TO_SETS),
        "prepend_instance_prompt only_instance_prompt disable_multiline_split",
    ),
    (_refused(_NO_DELETING, False, remedy=_UNUSABLE), "delete_unwanted_images delete_problematic_images"),
    (_refused(_NO_JUDGING, False), "delete_nsfw_images enable_nsfw_check"),
    (_refused("a missing image is an error", False), "ignore_missing_files"),
    # Files and services
    (
        _refused("rolling checkpoints are not supported", 0, remedy=", or give checkpoint_step_interval"),
        "checkpointing_rolling_steps",
    ),
    (
        _refused(_NO_SCRIPTS, remedy=_FOLLOW),
        "post_checkpoint_script post_upload_script validation_external_script disk_low_script",
    ),
    (_refused("report_to takes only tensorboard and wandb", remedy=_FOLLOW), "custom_tracker"),
    (_refused("code from a model's repository is never run", False), "trust_remote_code"),
    (
        _refused(
            "the transformer's folder is a separate option",
            "transformer",
            remedy=", and give the folder as pretrained_transformer_model_name_or_path",
        ),
        "pretrained_transformer_subfolder",
    ),
    (_refused("watermarks are not supported", False), "enable_watermark"),
)
"""Options that request an unsupported feature."""

_ALWAYS_FOUND = "folders are read at each start"
_BY_CONTENT = "caches are checked by content, and never deleted"
_OTHER_MODEL = "it is for other models"
_NO_HUB = "push_to_hub is false"
_THREADS = "max_workers counts the threads that prepare images"
_NO_VIDEO = "it is for video and sound"

_IGNORED_OPTIONS: Mapping[str, OtherKey] = _named(
    # Data
    (_ignored("no bucket is pruned", True), "disable_bucket_pruning"),
    (_ignored("images of a bucket smaller than a batch are repeated", True), "allow_dataset_oversubscription"),
    (_ignored("sides are rounded to 16 pixels", 16), "aspect_bucket_alignment"),
    (_ignored("shapes are computed in whole pixels"), "aspect_bucket_rounding"),
    (_ignored(_ALWAYS_FOUND), "skip_file_discovery aspect_bucket_disable_rebuild metadata_update_interval"),
    (
        _ignored(_BY_CONTENT),
        "vae_cache_scan_behaviour preserve_data_backend_cache override_dataset_config compress_disk_cache",
    ),
    (_ignored("all captions are encoded before the first step"), "text_embed_full_cache"),
    (
        _ignored(_THREADS),
        "aspect_bucket_worker_count enable_multiprocessing image_processing_batch_size read_batch_size",
    ),
    (_ignored("the number of prefetched batches is fixed"), "dataloader_prefetch_qlen"),
    (_ignored("simpletuner dataset scan shows what is found"), "debug_aspect_buckets debug_dataset_loader"),
    (_ignored("simpletuner dataset scan shows what is found"), "print_filenames print_sampler_statistics"),
    (_ignored("no dataset is in S3"), "aws_max_pool_connections"),
    # Training
    (
        _ignored("each sample draws its timestep independently; see timestep_strata", True),
        "disable_segmented_timestep_sampling",
    ),
    (_ignored("max_train_steps, else num_train_epochs, ends a run"), "strict_epoch_limit"),
    (_ignored("each solver has a fixed order", 2), "scheduled_sampling_order"),
    (_ignored("all random draws of a run follow from seed"), "seed_for_each_device"),
    (_ignored("flow_schedule_shift determines FLUX.2's timesteps"), "training_scheduler_timestep_spacing"),
    (_ignored("flow_schedule_shift determines FLUX.2's timesteps"), "inference_scheduler_timestep_spacing"),
    (_ignored("offset_noise is false"), "noise_offset noise_offset_probability"),
    (_ignored("use_soft_min_snr is false"), "soft_min_snr_sigma_data snr_weight"),
    (_ignored("diff2flow_enabled is false"), "diff2flow_loss"),
    (_ignored("nothing is distilled"), "distillation_config"),
    (_ignored("lora_type is not lycoris"), "lycoris_config"),
    (_ignored("peft_lora_mode is standard"), "singlora_ramp_up_steps"),
    (_ignored("no assistant LoRA is loaded"), "assistant_lora_strength assistant_lora_inference_strength"),
    (_ignored("no assistant LoRA is loaded"), "disable_assistant_lora"),
    (_ignored("no ControlNet is trained"), "controlnet_custom_config controlnet_model_name_or_path"),
    (
        _ignored("the text encoder is not trained"),
        "text_encoder_limit text_encoder_lr save_text_encoder freeze_encoder_after freeze_encoder_before "
        "freeze_encoder_strategy",
    ),
    (_ignored("gradients have the parameters' precision, fp32 for adapters", "unmodified"), "gradient_precision"),
    (_ignored("ema_device sets where the average is kept"), "ema_cpu_only ema_foreach_disable"),
    (_ignored("no check can be skipped"), "i_know_what_i_am_doing"),
    # Memory and speed, without effect on the result
    (_ignored("fp32 is never TF32", True), "disable_tf32"),
    (
        _ignored("it would not change the result", False),
        "fuse_qkv_projections fused_qkv_projections set_grads_to_none offload_during_save",
    ),
    (_ignored("memory is released at the end of each phase"), "accelerator_cache_clear_interval keep_vae_loaded"),
    (_ignored("the text encoder is unloaded once the captions are cached"), "fully_unload_text_encoder"),
    (_ignored("each kind of block is compiled as one graph"), "dynamo_dynamic dynamo_fullgraph"),
    (_ignored("each kind of block is compiled as one graph"), "dynamo_use_regional_compilation"),
    (_ignored("attention_mechanism is not sage"), "sageattention_usage"),
    (
        _ignored("gradient_checkpointing_offload_attention is false"),
        "gradient_checkpointing_offload_pin_memory_max_buckets gradient_checkpointing_offload_prefetch",
    ),
    (_ignored("musubi_blocks_to_swap is not set"), "musubi_block_swap_device"),
    (_ignored("OMP_NUM_THREADS in the environment sets it"), "torch_num_threads"),
    # Processes
    (_ignored("gradient_checkpointing applies to sharded models too", False), "fsdp_activation_checkpointing"),
    (
        _ignored("each transformer block is sharded separately", "TRANSFORMER_BASED_WRAP"),
        "fsdp_auto_wrap_policy fsdp_transformer_layer_cls_to_wrap",
    ),
    (_ignored("each process reads only its shard of each file", True), "fsdp_cpu_ram_efficient_loading"),
    (_ignored("FSDP2 limits its all-gathers itself", True), "fsdp_limit_all_gathers"),
    (
        _ignored("checkpoints have this program's own format, from which any number of processes can resume"),
        "fsdp_state_dict_type",
    ),
    (_ignored("fsdp_enable always means FSDP2", 2), "fsdp_version"),
    (_ignored("nothing depends on it", True), "same_network"),
    (_ignored("each process gets its own rank"), "local_rank"),
    (_ignored("gradients are reduced once per step, even if some are missing", False), "find_unused_parameters"),
    (_ignored("context_parallel_size is 1"), "context_parallel_comm_strategy"),
    (_ignored("deepspeed_config is not set"), "offload_param_path"),
    # Validation
    (_ignored("no image of the empty prompt is generated", True), "validation_disable_unconditional"),
    (_ignored("all processes share the validation images", "single-gpu", "batch-parallel"), "validation_multigpu"),
    (_ignored("the noise of validation images is drawn on the CPU", "cpu"), "validation_seed_source"),
    (_ignored("a jpg has a fixed quality"), "validation_image_quality"),
    (_ignored("validation_preview is false"), "validation_preview_steps"),
    (_ignored("validation images are saved without their references"), "validation_stitch_input_location"),
    (_ignored("no script generates validation images"), "validation_external_background"),
    (_ignored("internal guidance is not trained"), "validation_internal_guidance_scale"),
    (
        _ignored("validation_adapter_path is not set"),
        "validation_adapter_mode validation_adapter_name validation_adapter_strength",
    ),
    (_ignored("the held-out loss is measured at fixed timesteps"), "eval_timesteps"),
    (_ignored("each eval set has its own loss curve", False), "eval_dataset_pooling"),
    (_ignored(_NO_EVALUATION), "pretrained_evaluation_model_name_or_path"),
    # Files and services
    (
        _ignored(_NO_HUB),
        "hub_model_id model_card_private model_card_note model_card_safe_for_work push_to_hub_background",
    ),
    (_ignored("webhook_config is not set"), "webhook_reporting_interval"),
    (_ignored("checkpointing_rolling_steps is not set"), "checkpoints_rolling_total_limit"),
    (_ignored("a checkpoint is always written to a temporary folder, then renamed"), "checkpointing_use_tempdir"),
    (_ignored("a checkpoint that fails verification is skipped", False), "delete_invalid_checkpoints"),
    (_ignored("downloads stay in the Hub's cache", False), "delete_model_after_load"),
    (_ignored("logs are in the run directory"), "logging_dir"),
    (
        _ignored("a run logs everything in events.jsonl"),
        "log_level training_loop_log_level image_prep_log_level dataset_plan_path",
    ),
    (_ignored("the layout of logged images is fixed", "gallery"), "tracker_image_layout"),
    (_ignored("--config and --env select the config"), "configs_dir merge_environment_config"),
    # Other models
    (_ignored(_NO_VIDEO), "framerate validation_num_video_frames vae_enable_temporal_roll"),
    (
        _ignored(_OTHER_MODEL),
        "data_aesthetic_score max_grounding_entities pretrained_gemma_model_name_or_path "
        "pretrained_grounding_model_name_or_path pretrained_t5_model_name_or_path pretrained_unet_model_name_or_path "
        "pretrained_unet_subfolder qwen_text_encoder_model_name_or_path t5_padding unet_attention_slice "
        "vae_enable_patch_conv flux_attention_masked_training flux_fast_schedule",
    ),
)
"""Options that change nothing, whatever their value."""

_PREFIXES: Mapping[str, OtherKey] = {
    # Settings of features that are always off, since their switch is rejected.
    **dict.fromkeys(
        ("crepa_", "irepa_", "urepa_", "layersync_", "nextlat_", "mixflow_", "twinflow_", "internal_guidance_", "xm_"),
        _ignored("its auxiliary loss is off"),
    ),
    "nsfw_check_": _ignored("enable_nsfw_check is false"),
    "ramtorch_": _ignored("ramtorch is false"),
    "refiner_training_": _ignored("refiner_training is false"),
    "timestep_bias_": _ignored("timestep_bias_strategy is none"),
    "validation_guidance_skip_": _ignored("guidance skips no layers"),
    "sdnq_": _ignored("SDNQ's precisions are not supported"),
    # Other models
    "audio_": _ignored(_NO_VIDEO),
    **dict.fromkeys(
        (
            "cosmos3_",
            "deepfloyd_",
            "krea2_",
            "minimax_",
            "pixart_",
            "sdxl_",
            "wan_",
            "text_encoder_2_",
            "text_encoder_3_",
            "text_encoder_4_",
        ),
        _ignored(_OTHER_MODEL),
    ),
}

_PRECISIONS: Mapping[str, OtherKey] = {
    "int8-w8a8": _later("matrix products in 8 bits"),
    "fp8-w8a8": _later("matrix products in 8 bits"),
    **{name: _value("this format is not supported", *ours) for name, ours in PRECISIONS_ELSEWHERE.items()},
}

OPTION_NICKNAMES: Mapping[str, str] = {
    "alpha": "lora_alpha",
    "base_model": "pretrained_model_name_or_path",
    "base_model_name": "pretrained_model_name_or_path",
    "base_precision": "base_model_precision",
    "batch_size": "train_batch_size",
    "caption_dropout": "caption_dropout_probability",
    "caption_dropout_rate": "caption_dropout_probability",
    "checkpoint_interval": "checkpoint_step_interval",
    "checkpoint_steps": "checkpoint_step_interval",
    "deepspeed": "deepspeed_config",
    "dim": "lora_rank",
    "discrete_flow_shift": "flow_schedule_shift",
    "dropout": "lora_dropout",
    "ema": "use_ema",
    "ema_update_step_interval": "ema_update_interval",
    "epochs": "num_train_epochs",
    "eval_interval": "eval_steps_interval",
    "eval_steps": "eval_steps_interval",
    "fsdp": "fsdp_enable",
    "gpus": "num_processes",
    "gradient_accumulation": "gradient_accumulation_steps",
    "learning_rate_scheduler": "lr_scheduler",
    "learning_rate_warmup_steps": "lr_warmup_steps",
    "linear": "lora_rank",
    "linear_alpha": "lora_alpha",
    "lora_dim": "lora_rank",
    "lr": "learning_rate",
    "lr_scheduler_num_cycles": "lr_num_cycles",
    "lr_scheduler_power": "lr_power",
    "lr_scheduler_type": "lr_scheduler",
    "lr_warmup": "lr_warmup_steps",
    "max_steps": "max_train_steps",
    "max_train_epochs": "num_train_epochs",
    "micro_batch_size_per_gpu": "train_batch_size",
    "model": "pretrained_model_name_or_path",
    "name_or_path": "pretrained_model_name_or_path",
    "network_alpha": "lora_alpha",
    "network_dim": "lora_rank",
    "network_dropout": "lora_dropout",
    "n_gpus": "num_processes",
    "nproc_per_node": "num_processes",
    "num_epochs": "num_train_epochs",
    "num_gpus": "num_processes",
    "num_train_steps": "max_train_steps",
    "optimizer_args": "optimizer_config",
    "optimizer_type": "optimizer",
    "project_name": "tracker_project_name",
    "rank": "lora_rank",
    "resume": "resume_from_checkpoint",
    "run_name": "tracker_run_name",
    "sample_every_n_steps": "validation_step_interval",
    "save_every_n_epochs": "checkpoint_epoch_interval",
    "save_every_n_steps": "checkpoint_step_interval",
    "save_precision": "lora_save_dtype",
    "save_steps": "checkpoint_step_interval",
    "shift": "flow_schedule_shift",
    "steps": "max_train_steps",
    "target": "flux_lora_target",
    "target_modules": "peft_lora_target_modules",
    "text_encoder_precision": "text_encoder_1_precision",
    "timestep_shift": "flow_schedule_shift",
    "train_steps": "max_train_steps",
    "tread": "tread_config",
    "unet_lr": "learning_rate",
    "validation_guidance_scale": "validation_guidance",
    "validation_interval": "validation_step_interval",
    "validation_prompts": "user_prompt_library",
    "warmup_steps": "lr_warmup_steps",
    "zero_stage": "deepspeed_config",
}

OPTION_ALIASES: Mapping[str, str] = {
    "validation_steps": "validation_step_interval",
    "checkpointing_steps": "checkpoint_step_interval",
    "save_total_limit": "checkpoints_total_limit",
    "flow_use_beta_schedule_alpha": "flow_beta_schedule_alpha",
    "flow_use_beta_schedule_beta": "flow_beta_schedule_beta",
    "adam_beta1": "optimizer_beta1",
    "adam_beta2": "optimizer_beta2",
    "flux_schedule_shift": "flow_schedule_shift",
    "flux_schedule_auto_shift": "flow_schedule_auto_shift",
    "flux_use_uniform_schedule": "flow_use_uniform_schedule",
    "flux_use_beta_schedule": "flow_use_beta_schedule",
    "flux_beta_schedule_alpha": "flow_beta_schedule_alpha",
    "flux_beta_schedule_beta": "flow_beta_schedule_beta",
    "lora_initialisation_style": "lora_init_type",
}

OTHER_OPTIONS = OtherKeys(
    keys={**LATER_OPTIONS, **_REFUSED_OPTIONS, **_IGNORED_OPTIONS},
    prefixes=_PREFIXES,
    values={
        "model_type": {"controlnet": _value("this program trains no ControlNets", "lora", "full")},
        "lora_type": dict.fromkeys(("dora", "lokr", "loha", "oft", "lycoris"), _later(_ADAPTERS)),
        "lora_init_type": dict.fromkeys(("pissa", "olora", "loftq"), _later("initializations that change the base")),
        "flux_lora_target": {
            "controlnet": _value("this program trains no ControlNets", "all", "attention", "mlp", "tiny"),
            "all+ffs": _value("all includes the feed-forward layers already", "all"),
        },
        "dynamo_mode": dict.fromkeys(("reduce-overhead", "max-autotune"), _later("compiled blocks in CUDA graphs")),
        "disk_low_action": {"script": _value(_NO_SCRIPTS, "stop", "wait")},
        "base_model_precision": _PRECISIONS,
        "text_encoder_1_precision": _PRECISIONS,
    },
    aliases=OPTION_ALIASES,
    nicknames=OPTION_NICKNAMES,
)
"""Known keys of a config that are not options."""

# Datasets

_NO_GENERATING = "this program generates no conditioning images"
_LEAVE_OUT = "Leave the entry out."
_RUN_DECIDES = "the run's option applies to all datasets"

_COMMON_KEYS: Mapping[str, OtherKey] = _named(
    (_later(_S3), "aws_bucket_name aws_data_prefix aws_endpoint_url aws_region_name aws_access_key_id"),
    (_later(_S3), "aws_secret_access_key"),
    (_ignored(_BY_CONTENT), "hash_filenames preserve_data_backend_cache cache_file_suffix"),
    (_ignored(_ALWAYS_FOUND), "skip_file_discovery metadata_update_interval scan_for_errors"),
    (_ignored(_RUN_DECIDES), "text_encoder_batch_size"),
)
"""Keys of image sets and of text stores."""

_TYPES = {"aws": _later(_S3), "csv": _later(_CSV), "huggingface": _later(_HF_DATASETS)}

OTHER_SET_KEYS = OtherKeys(
    keys={
        **_COMMON_KEYS,
        **_named(
            (_refused(_NO_GENERATING, [], remedy=", and name the set in conditioning_data"), "source_dataset_id"),
            (_later("stores for latents"), "image_embeds"),
            (
                _later(_CACHING, False),
                "vae_cache_clear_each_epoch vae_cache_ondemand vae_cache_disable text_cache_ondemand "
                "text_cache_disable",
            ),
            (_later(_PARQUET, {}), "parquet"),
            (_later(_CSV), "csv_file csv_url_column csv_caption_column csv_cache_dir"),
            (
                _later(_HF_DATASETS, {}),
                "huggingface dataset_name split revision image_column caption_column streaming",
            ),
            (_refused(_NO_DELETING, False, remedy=_UNUSABLE), "delete_unwanted_images delete_problematic_images"),
            (_refused(_NO_JUDGING, False), "delete_nsfw_images"),
            (_refused("this program trains no slider LoRAs", 0, 0.0), "slider_strength"),
            (_refused("repeats counts EXTRA passes", remedy=", and set repeats to one less"), "num_repeats"),
            (
                _refused("captions are .txt files, else .caption files", remedy=", and give caption_strategy textfile"),
                "caption_ext caption_extension",
            ),
            (
                _refused(_NO_GENERATING, False, [], {}, remedy=", and generate them with another program"),
                "conditioning canny depth jpeg_artifacts random_masks sdr superresolution",
            ),
            (_refused("this program trains on images, not on video or sound", {}), "video audio"),
            (
                _ignored("references are encoded by the VAE", False),
                "cache_dir_conditioning_image_embeds conditioning_image_embeds conditioning_image_embed_batch_size",
            ),
        ),
    },
    values={
        "type": _TYPES,
        "dataset_type": {
            "conditioning_image_embeds": OtherKey("references are encoded by the VAE", _LEAVE_OUT),
            "image_embeds": OtherKey(NOT_YET + "stores for latents", _LEAVE_OUT),
        },
        "crop_style": {"face": _later("crops that follow a face")},
        "caption_strategy": {
            "parquet": _later(_PARQUET),
            "csv": _later(_CSV),
            "huggingface": _later(_HF_DATASETS),
        },
        "metadata_backend": {"parquet": _later(_PARQUET), "huggingface": _later(_HF_DATASETS)},
    },
    aliases={"instance_data_root": "instance_data_dir"},
    nicknames={
        "cache_dir": "cache_dir_vae",
        "folder_path": "instance_data_dir",
        "image_directory": "instance_data_dir",
        "image_dir": "instance_data_dir",
        "class_tokens": "instance_prompt",
        "trigger_word": "instance_prompt",
    },
)
"""Known keys of an image set's entry that this program does not use."""

OTHER_CONDITION_KEYS = replace(
    OTHER_SET_KEYS,
    values={name: values for name, values in OTHER_SET_KEYS.values.items() if name in ("type", "dataset_type")},
    nicknames={name: meant for name, meant in OTHER_SET_KEYS.nicknames.items() if meant != "instance_prompt"},
)
"""The same for a conditioning set, which has no captions."""

OTHER_STORE_KEYS = OtherKeys(
    keys={
        **_COMMON_KEYS,
        **_named(
            (
                _refused("image sets name the store they use", False, remedy=", or remove the whole entry"),
                "disabled",
            ),
        ),
    },
    values={"type": _TYPES},
)
"""Known keys of a text store's entry that this program does not use."""

# DeepSpeed

DEEPSPEED_KEYS = OtherKeys(
    keys=_named(
        (
            _ignored("this program has its own loop, logs and checkpoints", False, {}, {"enabled": False}),
            "activation_checkpointing aio checkpoint comet comms_logger compile csv_monitor dataloader_drop_last "
            "datastates_ckpt disable_python_gc dump_state elastic_checkpoint flops_profiler ignore_unused_parameters "
            "load_from_fp32_weights log_level managed_gradient_accumulation memory_breakdown "
            "pipeline_loading_checkpoint stage3_gather_16bit_weights_on_model_save steps_per_print sub_group_size "
            "tensorboard timers wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
        ),
        (
            _refused(
                "this is not supported", False, 1, {}, {"enabled": False}, {"grad_accum_dtype": "fp32"}, "fp32", "mean"
            ),
            "amp autotuning communication_data_type compression_training curriculum_learning data_efficiency "
            "data_types disable_allgather elasticity expert_parallel gradient_allreduce_op gradient_predivide_factor "
            "hybrid_engine pipeline prescale_gradients progressive_layer_drop round_robin_gradients "
            "seq_parallel_communication_data_type sequence_parallel_size sparse_attention sparse_gradients "
            "tensor_parallel torch_autocast use_data_before_expert_parallelism weight_quantization "
            "zero_quantized_gradients zero_quantized_weights",
        ),
    ),
    nicknames={"bfloat16": "bf16", "cpu_offload": "offload_optimizer", "zero_stage": "zero_optimization"},
)
"""Known keys of a DeepSpeed config, or of its `zero_optimization`, that `deepspeed_config` does not read."""
