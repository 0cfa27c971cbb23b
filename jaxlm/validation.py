"""What is wrong with a config that the config alone shows. No JAX in this file, as in config.py."""

import re

from ml_collections import ConfigDict

from jaxlm.config import BALANCED, flatten, import_parts, layer_period, nearest_multiple, rotated_size, steps_of
from jaxlm.errors import UserError
from jaxlm.registry import did_you_mean
from jaxlm.stages import stages_of

PREFERENCE = ("dpo", "orpo", "simpo")  # objectives of pairs of answers
POSITIVE = ("steps", "batch_size", "seq_len", "grad_accum_steps", "model.num_layers", "model.embed_dim", "model.num_heads",
            "model.num_kv_heads", "model.mlp_dim", "model.vocab_multiple", "model.scan_unroll", "model.ngram_max",
            "model.ngram_buckets", "eval.batch_size", "observe.log_every")  # at least 1
SIGNED = ("model.decoder_start", "eval.length_penalty", "objective.margin", "mesh.data", "mesh.fsdp", "mesh.tensor",
          "mesh.context", "mesh.expert", "mesh.stage")  # may be negative; no other number may
BELOW_1 = ("model.dropout", "model.token_dropout", "optimizer.b1", "optimizer.b2", "optimizer.b3", "optimizer.momentum",
           "optimizer.ema_decay", "objective.label_smoothing")  # from 0, and below 1


def validate(config: ConfigDict) -> None:
    """Every problem that the config alone shows, all at once. Raises UserError."""
    problems = []

    def check(ok, problem):
        if not ok:
            problems.append(problem)

    c, m = config, config.model
    flat = flatten(c)
    for key in POSITIVE:
        check(flat[key] > 0, f"{key}={flat[key]}: must be at least 1")
    if not problems:
        check(c.batch_size % c.grad_accum_steps == 0,
              f"batch_size={c.batch_size} is not divisible by grad_accum_steps={c.grad_accum_steps}; "
              f"use batch_size={nearest_multiple(c.batch_size, c.grad_accum_steps)}")
        check(m.head_dim or m.embed_dim % m.num_heads == 0,
              f"model.embed_dim={m.embed_dim} is not divisible by model.num_heads={m.num_heads}; "
              f"use embed_dim={nearest_multiple(m.embed_dim, m.num_heads)} or set model.head_dim")
        check(m.num_heads % m.num_kv_heads == 0,
              f"model.num_heads={m.num_heads} is not divisible by model.num_kv_heads={m.num_kv_heads}")
        check(m.position != "rope" or m.rope_theta > 0 and 0 < m.rope_fraction <= 1,
              f"model.rope_theta={m.rope_theta}, model.rope_fraction={m.rope_fraction}: must be above 0, the second at most 1")
        check(m.position != "rope" or rotated_size(m) % 2 == 0,
              f"model.head_dim={m.head_dim}: rope needs an even number" +
              (f", model.rope_fraction={m.rope_fraction} of it too" if m.rope_fraction != 1 else ""))
        check((m.num_layers - m.first_dense_layers) % layer_period(m) == 0 or not m.scan_layers,
              f"model.num_layers={m.num_layers} is not a multiple of the length of model.window_pattern="
              f"{m.window_pattern!r} and model.rope_pattern={m.rope_pattern!r}; that is needed when model.scan_layers=True")
    for key, value in flat.items():
        if key in BELOW_1:
            check(0 <= value < 1, f"{key}={value}: must be in [0, 1)")
        elif isinstance(value, int | float) and key not in (*SIGNED, *POSITIVE):
            check(value >= 0, f"{key}={value}: must not be negative")
    check(re.fullmatch("[LG]+", m.window_pattern), f"model.window_pattern={m.window_pattern!r}: use letters L and G")
    check(re.fullmatch("[RN]+", m.rope_pattern), f"model.rope_pattern={m.rope_pattern!r}: use letters R and N")
    check("L" not in m.window_pattern or m.window > 0, "model.window_pattern has local layers: set model.window > 0")
    if m.feedforward == "moe":
        check(m.num_experts > 0, f"model.num_experts={m.num_experts}: must be at least 1")
        check(0 < m.experts_per_token <= max(1, m.num_experts),
              f"model.experts_per_token={m.experts_per_token}: must be from 1 to model.num_experts={m.num_experts}; "
              f"use {min(max(1, m.experts_per_token), max(1, m.num_experts))}")
        check(m.capacity_factor > 0, f"model.capacity_factor={m.capacity_factor}: must be above 0; 1 is an equal share")
        first = f"model.first_dense_layers={m.first_dense_layers}"
        check(0 <= m.first_dense_layers < max(1, m.num_layers), f"{first}: must be below model.num_layers={m.num_layers}")
        check(m.first_dense_layers % layer_period(m) == 0, f"{first} is not a multiple of the length of model.window_pattern="
              f"{m.window_pattern!r} and model.rope_pattern={m.rope_pattern!r}")
        size = max(1, m.num_experts) // max(1, m.router_groups)
        check(m.router_groups > 0 and m.num_experts % m.router_groups == 0,
              f"model.router_groups={m.router_groups}: must divide model.num_experts={m.num_experts}")
        check(m.router_groups == 1 or (0 < m.router_groups_per_token <= m.router_groups
                                       and m.experts_per_token <= m.router_groups_per_token * size),
              f"model.router_groups_per_token={m.router_groups_per_token}: there must be so many groups, of {size} experts each, "
              f"for model.experts_per_token={m.experts_per_token}")
        check(m.router_groups == 1 or 0 < m.router_group_best <= size,
              f"model.router_group_best={m.router_group_best}: must be from 1 to the {size} experts of a group")
    else:
        check(not m.first_dense_layers, f"model.first_dense_layers={m.first_dense_layers}: is for model.feedforward=moe; use 0")
    if m.attention == "latent":
        check(m.num_kv_heads == m.num_heads, f"model.num_kv_heads={m.num_kv_heads}: model.attention=latent has keys and values "
              f"for every head; use {m.num_heads}")
        check(rotated_size(m) < m.head_dim,
              f"model.rope_fraction={m.rope_fraction}: model.attention=latent rotates only a part of each head; use 0.5")
        check(m.kv_rank > 0, f"model.kv_rank={m.kv_rank}: must be at least 1")
        check(0 <= m.value_head_dim <= m.head_dim, f"model.value_head_dim={m.value_head_dim}: must not be above model.head_dim="
              f"{m.head_dim}")
        for key in ("value_residual", "attention_sinks", "qk_norm"):
            check(not m[key], f"model.{key}=True: model.attention=latent has none; set it to False")
    if m.family == "encoder":
        check("L" not in m.window_pattern, f"model.window_pattern={m.window_pattern!r}: model.family=encoder has none; use G")
    else:
        for key in ("masked_lm_head", "pooler", "token_types"):
            check(not m[key], f"model.{key}={m[key]}: is for model.family=encoder; remove it")
    if m.family == "encoder_decoder":
        for key in ("first_dense_layers", "value_residual", "embed_norm"):
            check(not m[key], f"model.{key}={m[key]}: model.family=encoder_decoder has none; remove it")
        for key, wanted in (("window_pattern", "G"), ("norm_place", "pre"), ("block", "serial"), ("ngram_max", 1)):
            check(m[key] == wanted, f"model.{key}={m[key]!r}: model.family=encoder_decoder needs {wanted!r}")
    if m.prefix_attention:
        for key, wanted in (("model.family", "decoder"), ("data.form", "pair"), ("objective.name", "next_token"),
                            ("model.attention", "multihead"), ("model.window_pattern", "G")):
            check(flat[key] == wanted, f"model.prefix_attention=True: needs {key}={wanted}, not {flat[key]}")
        check(m.position != "relative", "model.prefix_attention=True: model.position=relative counts no later tokens; use rope")
    check(m.position != "relative" or m.relative_max_distance > m.relative_buckets // 2 > 1,
          f"model.relative_max_distance={m.relative_max_distance}: must be above half of model.relative_buckets="
          f"{m.relative_buckets}, which must be at least 4")
    check(m.position != "relative" or m.attention == "multihead",
          f"model.attention={m.attention!r}: model.position=relative needs model.attention=multihead")
    check(not m.num_classes or m.family != "encoder_decoder",
          f"model.num_classes={m.num_classes}: model.family=encoder_decoder has no head for classes; use encoder or decoder")
    check(m.norm_place != "sum" or m.block == "serial", f"model.block={m.block!r}: model.norm_place=sum needs model.block=serial")
    check(not (m.from_scratch or m.adapter) or m.from_pretrained,
          "model.from_scratch and model.adapter: are for model.from_pretrained; set it, or remove them")
    check(0 <= c.eval.stride <= c.seq_len, f"eval.stride={c.eval.stride}: must be from 1 to seq_len={c.seq_len}, or 0 (off)")
    check(not c.eval.patience or c.data.source != "synthetic" and c.eval.every_steps not in (0, "0%"),
          f"eval.patience={c.eval.patience}: needs text to evaluate on, and eval.every_steps above 0")
    of_tokens, of_examples = ("next_token", "seq2seq", "distillation"), (*PREFERENCE, "classification")
    untold = {"accuracy": of_tokens, "perplexity": of_examples, "bits_per_byte": of_examples}  # by objectives
    check(c.objective.name not in untold.get(c.eval.metric, ()),
          f"eval.metric={c.eval.metric!r}: objective.name={c.objective.name} tells none; use loss")
    check(not c.data.jitter or c.data.packing == "concat",
          f"data.jitter=True: data.packing={c.data.packing} has no grid to move; use data.packing=concat or jitter=False")
    problems += import_parts(c.imports) + example_problems(c)
    check(0 < c.data.valid_fraction < 1 or c.data.valid_path or c.data.valid_every,
          "data.valid_fraction: must be between 0 and 1")
    choices = {"model.block": ("serial", "parallel"), "model.norm_place": ("pre", "post", "both", "sum"),
               "model.qk_norm_over": ("head", "all"),
               "model.param_dtype": ("float32", "bfloat16"), "model.compute_dtype": ("float32", "bfloat16"),
               "optimizer.moment_dtype": ("float32", "bfloat16"), "optimizer.nonfinite": ("stop", "skip"),
               "model.pooling": ("last", "first", "mean"), "data.source": ("files", "synthetic"),
               "data.document": ("file", "line"),
               "data.mixture_by": ("given", "tokens", "documents"), "data.packing": ("concat", "best_fit", "one"),
               "objective.kl": ("forward", "reverse"), "data.errors": ("strict", "replace"), "data.on_error": ("stop", "skip"),
               "data.array_record": ("json", "text", "tf_example"), "observe.progress": ("auto", "live", "lines", "none"),
               "eval.metric": ("loss", "perplexity", "bits_per_byte", "accuracy"),
               "schedule.decay_shape": ("linear", "1-sqrt"), "kernels.loss": ("auto", "plain", "chunked"),
               "kernels.context": ("ring", "all_gather"),
               "model.expert_form": ("swiglu", "geglu", "clamped_swiglu", "gelu", "gelu_exact", "relu", "relu2"),
               "model.router_score": ("softmax", "sigmoid"), "model.routing": ("dropless", "capacity"),
               "model.parametrization": ("standard", "mup", "completep"),
               "mesh.zero_stage": (1, 3), "kernels.fused_projections": ("auto", "always", "never"),
               "kernels.quantization": ("none", "int8", "fp8")}
    for key, valid in choices.items():
        check(flat[key] in valid, f"{key}={flat[key]!r}: {did_you_mean(flat[key], valid)}")
    for axis in ("data", "fsdp", "tensor", "context", "expert", "stage"):
        check(c.mesh[axis] > 0 or c.mesh[axis] == -1, f"mesh.{axis}={c.mesh[axis]}: give a number of devices, or -1 for the rest")
    check(sum(v == -1 for v in c.mesh.values()) <= 1, "mesh: at most one axis may be -1 (the rest of the devices)")
    for key, value in flat.items():
        if key.endswith("_steps") and not problems:
            try:
                steps_of(value, c, key)
            except UserError as error:
                problems.extend(error.problems)
    if not problems:
        try:
            stages_of(c)
        except UserError as error:
            problems.extend(error.problems)
    if not problems:
        warmup = steps_of(c.schedule.warmup_steps, c, "schedule.warmup_steps")
        check(warmup < c.steps, f"schedule.warmup_steps={c.schedule.warmup_steps!r} is {warmup} steps of a run of {c.steps}; "
                                "make it shorter than the run")
    problems += parametrization_problems(c)
    if problems:
        raise UserError(*problems)


def example_problems(c: ConfigDict) -> list[str]:
    """Of data.form and what must fit to it."""
    d, o, m, problems = c.data, c.objective, c.model, []

    def check(ok, problem):
        if not ok:
            problems.append(problem)

    check(bool(d.classes) == (d.form == "label") and len(set(d.classes)) == len(d.classes),
          f"data.classes={d.classes}: names each class once, with data.form=label, and is () otherwise")
    check(not d.parallel or d.form == "pair" and len(d.parallel) > 1,
          f"data.parallel={d.parallel}: needs data.form=pair and at least two endings")
    e = c.eval
    check(not (e.text_metrics or e.answers) or d.form == "pair",
          f"eval.text_metrics={e.text_metrics}, eval.answers={e.answers}: need data.form=pair; remove them")
    check(e.text_metrics or not e.answers, f"eval.answers={e.answers}: are scored by eval.text_metrics; set it: ('bleu',)")
    check(e.beams > 0, f"eval.beams={e.beams}: must be at least 1; 1 is greedy")
    check(e.max_new_tokens < c.seq_len, f"eval.max_new_tokens={e.max_new_tokens}: must be below seq_len={c.seq_len}")
    if e.text_metrics:
        from jaxlm.evaluate.text_metrics import METRICS

        for name in e.text_metrics:
            check(name in METRICS, f"eval.text_metrics: unknown {name!r}; {did_you_mean(name, METRICS)}")
    check(d.valid_every != 1, f"data.valid_every={d.valid_every}: must be 0 (off), or above 1")
    check(d.folds == 0 or d.form in ("pair", "label", "chat") and d.folds > 1 and 0 <= d.fold < d.folds,
          f"data.folds={d.folds}, data.fold={d.fold}: needs data.form=label, pair or chat, at least 2 folds, and one of them")
    for objective, form in (("classification", "label"), ("seq2seq", "pair"), *((name, "preference") for name in PREFERENCE)):
        check(o.name != objective or d.form == form or d.source == "synthetic",
              f"data.form={d.form!r}: objective.name={objective} needs {form!r}")
    check(o.name != "seq2seq" or m.family == "encoder_decoder",
          f"objective.name=seq2seq: model.family={m.family} reads one text; use model.family=encoder_decoder")
    check((o.name == "classification") == bool(m.num_classes) or m.family == "encoder" and o.name != "classification",
          f"model.num_classes={m.num_classes}: goes with objective.name=classification")
    check(d.form != "preference" or o.name in PREFERENCE,
          f"objective.name={o.name!r}: data.form=preference needs one of {', '.join(PREFERENCE)}")
    check(o.name not in (*PREFERENCE, "distillation") or m.family == "decoder",
          f"model.family={m.family!r}: objective.name={o.name} needs decoder")
    check(o.name != "dpo" or m.from_pretrained or d.source == "synthetic",
          "objective.name=dpo: needs model.from_pretrained, a model that answers already; set it to the run of your fine-tuning")
    check((o.name == "distillation") == bool(o.teacher),
          f"objective.teacher={o.teacher!r}: goes with objective.name=distillation")
    check(o.beta > 0 and o.temperature > 0, "objective.beta, objective.temperature: must be above 0")
    check(0 <= o.teacher_weight <= 1, f"objective.teacher_weight={o.teacher_weight}: must be from 0 to 1")
    check(o.name != "dpo" or o.label_smoothing < 0.5, f"objective.label_smoothing={o.label_smoothing}: of dpo must be below 0.5")
    check(o.name == "classification" or not o.class_weights,
          "objective.class_weights: is of objective.name=classification; remove it")
    check(o.class_weights in ((), BALANCED) or len(o.class_weights) == m.num_classes and all(
        isinstance(weight, int | float) and weight >= 0 for weight in o.class_weights),
          f"objective.class_weights={o.class_weights}: give one number, not negative, for each of {m.num_classes} classes, or "
          f"{BALANCED}")
    return problems


def parametrization_problems(c: ConfigDict) -> list[str]:
    """What `jaxlm.models.parametrization` has no rule for."""
    m = c.model
    if m.parametrization == "standard":
        return []
    what = f"model.parametrization={m.parametrization}"
    least = {"base_embed_dim": 1, "base_head_dim": 0, "base_num_layers": int(m.parametrization == "completep")}
    problems = [f"model.{key}={m[key]}: {what} needs that of the model which was tuned" for key, n in least.items() if m[key] < n]
    for key, wanted in (("family", "decoder"), ("attention", "multihead"), ("lora_rank", 0)):
        if m[key] != wanted:
            problems.append(f"model.{key}={m[key]!r}: {what} has no rule for it; use {wanted!r}")
    if m.feedforward == "moe":
        problems.append(f"model.feedforward='moe': {what} has no rule for routers; use another")
    if c.optimizer.name not in ("adamw", "lion", "muon"):
        problems.append(f"optimizer.name={c.optimizer.name!r}: {what} has no rule for it; use adamw, lion or muon")
    return problems
