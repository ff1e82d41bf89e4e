"""Names of keys in other trainers (TRL, transformers, verl): the corresponding key here, or why there is none.

A name is looked up in full and by its last part, so `grpo.learning_rate` is found as well.
"""

OTHER_NAMES = {
    "chat_template_kwargs": "data.template_arguments",
    "enable_thinking": "+data.template_arguments.enable_thinking",
    # of earlier versions
    "objective.epsilon": "objective.epsilon_low and objective.epsilon_high",
    # TRL's GRPOConfig and transformers' TrainingArguments
    "output_dir": "run_dir",
    "run_name": "tracking.name",
    "project": "tracking.project",
    "report_to": "tracking, as tracking=wandb, offline or disabled",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "lr_scheduler_type": "grpo.lr_schedule",
    "optim": "optimizer, as optimizer=adamw",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "+optimizer.eps",
    "max_steps": "grpo.num_steps",
    "num_train_epochs": "grpo.num_steps; an epoch has as many steps as there are training problems per grpo.batch_size",
    "per_device_train_batch_size": "grpo.batch_size, in prompts; TRL counts completions",
    "train_batch_size": "grpo.batch_size, in prompts",
    "generation_batch_size": "grpo.batch_size, in prompts; TRL counts completions",
    "gradient_accumulation_steps": "hardware.micro_batch_tokens, which splits a batch without changing its size",
    "auto_find_batch_size": "hardware.micro_batch_tokens, which is halved if memory runs out",
    "steps_per_generation": "grpo.mu, the number of updates with the whole batch",
    "num_iterations": "grpo.mu if it is TRL's; grpo.num_iterations counts outer iterations, each with a new reference",
    "temperature": "rollout.temperature",
    "max_new_tokens": "grpo.max_completion_length",
    "epsilon_high": "objective.epsilon_high",
    "delta": "objective.delta",
    "sapo_temperature_pos": "objective.tau_positive",
    "sapo_temperature_neg": "objective.tau_negative",
    "use_bias_correction_kl": "objective.kl_correction",
    "entropy_coef": "objective.entropy_weight",
    "entropy_coeff": "objective.entropy_weight",
    "multi_objective_aggregation": "objective.advantage, as objective.advantage=normalize_then_sum",
    "vllm_importance_sampling_mode": "objective.sampling_correction",
    "vllm_importance_sampling_correction": "objective.sampling_correction",
    "vllm_importance_sampling_clip_max": "objective.sampling_cap",
    "vllm_importance_sampling_cap": "objective.sampling_cap",
    "loss_type": "objective, as objective=dapo, or objective.reduction",
    "scale_rewards": "objective.advantage",
    "importance_sampling_level": "objective.ratio",
    "reward_weights": "reward.components.<name>.weight",
    "sync_ref_model": "grpo.num_iterations, since the reference is replaced at the start of each iteration",
    "ref_model_sync_steps": "grpo.num_steps, the steps of an iteration, at whose start the reference is replaced",
    "bf16": "hardware.compute_dtype",
    "fp16": "hardware.compute_dtype",
    "autocast": "hardware.compute_dtype",
    "gradient_checkpointing": "hardware.activation_checkpointing",
    "use_cpu": "hardware, as hardware=cpu",
    "full_determinism": "deterministic",
    "data_seed": "seed",
    "logging_steps": "samples.every for completions; metrics are logged in every step",
    "log_completions": "samples.every, and tracking.completions_every for W&B",
    "num_completions_to_print": "samples.every, which writes all completions of a step to a file",
    "save_steps": "checkpoint.every",
    "save_strategy": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "load_best_model_at_end": "checkpoint.keep_best, which keeps the best weights in checkpoints/best",
    "eval_strategy": "eval.every",
    "eval_steps": "eval.every",
    "eval_on_start": "eval.before",
    "do_eval": "eval.before, eval.after and eval.every",
    "resume_from_checkpoint": "resume, as resume=true run_dir=...",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "dataset": "data",
    "dataset_name": "data.path",
    # peft
    "use_peft": "tuning, as tuning=lora",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target_modules": "model.lora.target_modules",
    # others, and verl
    "kl_coef": "grpo.beta",
    "kl_beta": "grpo.beta",
    "kl_loss_coef": "grpo.beta",
    "use_kl_loss": "grpo.beta; 0 is without",
    "clip_range": "grpo.epsilon",
    "clip_eps": "grpo.epsilon",
    "clip_ratio": "grpo.epsilon",
    "clip_ratio_c": "objective.delta",
    "clip_ratio_low": "objective.epsilon_low",
    "clip_ratio_high": "objective.epsilon_high",
    "adv_estimator": "objective.advantage",
    "loss_agg_mode": "objective.reduction",
    "ppo_epochs": "grpo.mu",
    "ppo_mini_batch_size": "grpo.batch_size; an update uses the whole batch, grpo.mu times",
    "micro_batch_size": "hardware.micro_batch_tokens",
    "ppo_micro_batch_size_per_gpu": "hardware.micro_batch_tokens",
    "ppo_max_token_len_per_gpu": "hardware.micro_batch_tokens",
    "max_response_length": "grpo.max_completion_length",
    "actor_rollout_ref.rollout.n": "grpo.num_generations",
    "actor_rollout_ref.model.path": "model.name",
    "enable_gradient_checkpointing": "hardware.activation_checkpointing",
    "train_files": "data.path, a folder with train.jsonl and test.jsonl",
    "val_files": "data.path, a folder with train.jsonl and test.jsonl",
    "save_freq": "checkpoint.every",
    "test_freq": "eval.every",
    "val_before_train": "eval.before",
    "total_epochs": "grpo.num_steps; an epoch has as many steps as there are training problems per grpo.batch_size",
    "total_training_steps": "grpo.num_steps",
    "project_name": "tracking.project",
    "experiment_name": "name",
    "default_local_dir": "run_dir",
    "n_gpus_per_node": "model.device_map, one device per run",
}

SAMPLED_AS_TRAINED = "completions are sampled from what is trained, the policy at rollout.temperature"
OWN_ENGINE = "this suite samples with its own engine; another one can be given as rollout._target_"
ONE_DEVICE = "a run uses one device"
EVERY_STEP = "every step is logged, to metrics/metrics.jsonl and W&B"
NO_HUB = "nothing is uploaded; final_model/ can be given to `hf upload`"
ON_SIGNAL = "a stop signal always saves, and resume=true continues"
IN_ORDER = "the order of the problems follows from the seed, and is continued exactly when a run is resumed"
FROM_COLUMNS = "the data has the fields question and answer, and all other fields are passed to the reward functions"
OWN_FUNCTION = "give a function of your own as one of the choices of the objective (objective.*)"
NOT_NEEDED = "it has no equivalent here"
WHOLE_PROBLEMS = "problems are evaluated with greedy decoding, by eval.before, eval.after and eval.every"
WITH_TRANSFORMERS = "the model is loaded and trained by this suite's own code; see conf/model/ and conf/hardware/"

NOT_SUPPORTED = {
    name: reason
    for reason, names in {
        "decoding with CUDA graphs was removed": "cuda_graphs",
        SAMPLED_AS_TRAINED: "top_p top_k min_p repetition_penalty generation_kwargs do_sample",
        OWN_ENGINE: "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
        "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
        "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
        "vllm_importance_sampling_clip_min use_transformers_paged use_transformers_continuous_batching "
        "transformers_continuous_batching_config cache_implementation use_cache max_tool_calling_iterations "
        "tensor_model_parallel_size gpu_memory_utilization",
        ONE_DEVICE: "deepspeed fsdp fsdp_config accelerator_config parallelism_config local_rank "
        "ds3_gather_for_generation ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
        "ddp_backend ddp_timeout log_on_each_node save_on_each_node average_tokens_across_devices nnodes",
        EVERY_STEP: "logging_strategy logging_first_step logging_nan_inf_filter include_num_input_tokens_seen "
        "log_unique_prompts log_multimodal log_level log_level_replica disable_tqdm skip_memory_metrics",
        "W&B is the only service that is supported": "trackio_space_id trackio_bucket_id trackio_static_space_id",
        NO_HUB: "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "log_completions_hub_repo",
        ON_SIGNAL: "enable_jit_checkpoint save_only_model restore_callback_states_from_checkpoint",
        IN_ORDER: "shuffle_dataset ignore_data_skip train_sampling_strategy dataloader_drop_last dataloader_in_order "
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context",
        FROM_COLUMNS: "remove_unused_columns label_names length_column_name",
        OWN_FUNCTION: "vespo_k_pos vespo_lambda_pos vespo_k_neg "
        "vespo_lambda_neg top_entropy_quantile use_adaptive_entropy "
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold "
        "label_smoothing_factor router_aux_loss_coef",
        WHOLE_PROBLEMS: "eval_delay per_device_eval_batch_size num_generations_eval prediction_loss_only "
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
        "metric_for_best_model greater_is_better do_train do_predict bf16_full_eval fp16_full_eval",
        WITH_TRANSFORMERS: "model_init_kwargs disable_dropout cast_lm_head_to_fp32 pad_to_multiple_of tf32 "
        "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config "
        "neftune_noise_alpha torch_empty_cache_steps gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        NOT_NEEDED: "ref_model_mixup_alpha lr_scheduler_kwargs optim_args optim_target_modules debug load_in_4bit "
        "load_in_8bit",
    }.items()
    for name in names.split()
}
