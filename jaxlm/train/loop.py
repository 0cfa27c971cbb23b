"""`train`: build everything, resume, step, watch, save. Reads from top to bottom.

How a run starts, in this order: a checkpoint in its own work directory; `model.from_pretrained`; from scratch.
"""

import os
import time

import jax

from jaxlm.checkpoint.manager import Checkpoints, base_of, without_base
from jaxlm.config import Tracked, fingerprint, settle_class_weights, steps_of
from jaxlm.data.feed import Feed, put_everywhere
from jaxlm.data.loader import build_data
from jaxlm.errors import Diverged, Preempted, UserError
from jaxlm.evaluate.perplexity import evaluate_split
from jaxlm.evaluate.suite import build_suite
from jaxlm.kernels.embedding import choose_embedding_gradient
from jaxlm.kernels.quantized import describe_quantization
from jaxlm.models.moe import describe_experts
from jaxlm.observe import process_log
from jaxlm.observe.progress import build_progress
from jaxlm.observe.throughput import Clock
from jaxlm.observe.watchdog import SLOW
from jaxlm.observe.writers import build_writers
from jaxlm.parallel import target
from jaxlm.parallel.compile import jit
from jaxlm.parallel.distributed import about_processes, is_main, num_processes, process_id, share
from jaxlm.parallel.rules import replicated
from jaxlm.parallel.table import sharding_table
from jaxlm.plan.executable import load as load_executable
from jaxlm.stages import describe_stages, stage_at, tokens_before
from jaxlm.train import heap
from jaxlm.train.base import describe_base, left_out
from jaxlm.train.frozen import check_frozen, read_frozen
from jaxlm.train.pretrained import pretrained_params
from jaxlm.train.record import cost_of, summarise, train_line
from jaxlm.train.rundir import completed_summary, keep_tokenizer, open_run_directory, write_json
from jaxlm.train.state import flatten_paths
from jaxlm.train.step import batches_of, build_eval_step, build_programs
from jaxlm.train.stop import Patience, StopSignal


def train(config, workdir: str, allow_config_change: bool = False, process_start: float | None = None,
          overrides: list[str] = (), alive=lambda doing="", allowance=1: None, executable: str = "") -> dict | None:
    """Train to `config.steps`. All processes of a run call it alike; process 0 writes what there is once, and returns the
    summary. overrides: those already in `config`, for `Tracked.unread`. `alive` is called at each sign of progress
    (`Watchdog.beat`). executable: a file of `jaxlm plan --save` with the compiled step; empty: compile it here.

    Raises UserError, Diverged, Preempted (see `jaxlm.errors`).
    """
    began = time.time() if process_start is None else process_start
    full_config, config = config, Tracked(config)
    from configs import default

    # ---- Build: everything that can be wrong is found before anything is written -------------------------------------
    data = build_data(config)
    settle_class_weights(full_config, data.class_counts)
    programs = build_programs(config, data.vocab_size)  # by stage; all but their batches' shapes are the same
    stages, program = tuple(programs), programs[next(reversed(programs))]
    model, mesh, feed, hyper = program.model, program.mesh, program.feed, put_everywhere(program.hyper, replicated(program.mesh))
    steps, log_every, look_every = config.steps, config.observe.log_every, config.observe.internals_every
    duration = lambda value, key: steps_of(value, full_config, key)
    eval_every = duration(config.eval.every_steps, "eval.every_steps")
    save_every = duration(config.checkpoint.every_steps, "checkpoint.every_steps")
    keep_every = duration(config.checkpoint.keep_every_steps, "checkpoint.keep_every_steps")
    policy, pretrained = config.optimizer.nonfinite, config.model.from_pretrained
    if pretrained:
        _ = config.model.from_scratch, config.model.adapter  # `pretrained_params` reads them
    keep, keep_best, metric = config.checkpoint.keep, config.checkpoint.keep_best, config.eval.metric
    most = config.eval.patience
    patience_at = lambda step: Patience(metric, most, workdir, step)
    suite = build_suite(config, model, data.tokenizer, mesh)
    eval_answers = config.eval.answers
    _ = config.eval.text_metrics, config.eval.beams, config.eval.length_penalty, config.eval.max_new_tokens  # by `Answers`
    eval_batches, sample_tokens, prompt = config.eval.batches, config.eval.sample_tokens, config.eval.sample_prompt
    if sample_tokens:
        from jaxlm.generate.prompts import sample_ids

        prompt_ids = sample_ids(prompt, data.tokenizer)
    wants_report = config.observe.report
    progress = build_progress(config, steps)
    # Read elsewhere: by the validation, by the command line, by the writers.
    _ = config.imports, config.observe.compile_cache, config.observe.tensorboard, config.observe.wandb
    _ = config.observe.join_seconds, config.observe.peer_seconds, config.observe.hang_seconds
    if unread := config.unread(default.get_config(), overrides):
        raise UserError(*unread)
    compiled = load_executable(executable, program) if executable else None
    share(lambda: open_run_directory(workdir, full_config, allow_config_change, program.compiler_options, data.fingerprint),
          "run directory")
    share(lambda: keep_tokenizer(workdir, full_config, data.tokenizer), "tokenizer")
    alive("starting", SLOW)
    process_log.open_log(workdir, process_id(), num_processes())
    process_log.write(about_processes())
    writers = build_writers(config, workdir)

    # ---- State: born on its devices, or restored -----------------------------------------------------------------------
    checkpoints = Checkpoints(os.path.join(workdir, "checkpoints"), keep, keep_every, keep_best, metric=metric)
    latest = checkpoints.latest()
    ended = latest is not None and (latest == steps or patience_at(latest).exhausted)
    if ended and (done := share(lambda: completed_summary(workdir), "summary")):
        return done
    unsaved = left_out(full_config, model)
    checkpoints.require_room(without_base(program.state, {f"params/{path}" for path in unsaved}))
    alive("restoring" if latest is not None else "initialising", SLOW)
    untaken, meta, frozen = [], {}, read_frozen(program, full_config)
    if latest is not None:
        _, state, meta = checkpoints.restore(program.state)
    else:
        state = jax.jit(program.init, out_shardings=program.shardings)(config.seed)
        if pretrained:
            state["params"], untaken = pretrained_params(program, full_config, state["params"])
    # A run whose checkpoints hold all, as those of an older jaxlm do, keeps to it.
    base = describe_base(state["params"], unsaved) if latest is None else base_of(meta)
    start, frozen_marks = int(state["step"]), check_frozen(meta, frozen, full_config)
    patience = patience_at(start)
    writers.truncate_after(start)
    alive("compiling", SLOW)

    # ---- Compile: once, ahead of the loop; the loop calls these very executables ---------------------------------------
    step_fns, compile_seconds = {stages[-1]: compiled} if compiled else {}, 0.0
    for stage in stages:
        if stage.end > start and stage not in step_fns:
            step_fns[stage], seconds = programs[stage].compile()
            compile_seconds += seconds
    eval_feed = Feed(feed.sharding, (config.eval.batch_size, config.seq_len))
    eval_step = jit(mesh, build_eval_step(model, program.objective, program.frozen))
    if look_every:
        from jaxlm.observe.internals import build_internals, internals_line

        looks = {stage: build_internals(full_config, programs[stage]) for stage in step_fns}

    # ---- Watch ----------------------------------------------------------------------------------------------------------
    costs = {stage: cost_of(stage.view(config), program) for stage in stages}
    names = list(flatten_paths(model.trained))
    active = model.num_active_parameters
    active = f" ({active:,} active for a token)" if active < model.num_parameters else ""
    about = [
        f"jaxlm {full_config.model.family}: {model.num_parameters:,} parameters{active}, vocabulary {data.vocab_size:,}, "
        f"{config.batch_size * config.seq_len:,} tokens a step",
        *describe_stages(stages),
        *([f"training {model.num_trained:,} of them, the others are frozen"] if model.num_trained < model.num_parameters else []),
        *untaken,
        *data.about,
        *suite.about,
        f"devices: {mesh.size} x {jax.devices()[0].device_kind}"
        + "".join(f", {a}={n}" for a, n in mesh.shape.items() if n > 1)
        + (f" (auto: {program.layout})" if program.layout else ""),
        *sharding_table(mesh, flatten_paths(model.specs), config.mesh.zero_stage),
        f"attention: {program.backend} ({program.why}); step "
        + (f"from {executable}; " if executable else f"compiled in {compile_seconds:.1f} s; ")
        + (f"resuming at step {start}" if start else f"starting with {pretrained}" if pretrained else "from scratch"),
        "embedding gradient: {} ({})".format(*choose_embedding_gradient(config, target.platform())),
        *describe_experts(config, target.platform()),
        *describe_quantization(config),
        *(["compiler options: " + ", ".join(f"{k}={v}" for k, v in program.compiler_options.items())]
          if program.compiler_options else []),
    ]
    process_log.write("\n".join(about))
    progress.start([*about, about_processes()] if num_processes() > 1 else about)
    answers = None
    if eval_answers:
        from jaxlm.evaluate.answers import Answers

        answers = Answers(config, model, data, "valid", eval_answers)
    totals = {"tokens": tokens_before(stages, start), "first_step": None,
              "flops": sum(tokens_before([stage], start) * costs[stage].causal_flops for stage in stages),
              "valid": {}, "improved": False, "train_loss": None, "speeds": []}
    generator = None

    def evaluated(params, batch):
        return eval_step(params, batch, *frozen)

    def averaged():
        return state["ema"] if "ema" in state else state["params"]

    def run_evaluation(step):
        nonlocal generator
        if data.valid is not None:
            lines = evaluate_split(evaluated, averaged(), data.valid, eval_feed, eval_batches)
            if answers:
                lines["all"] |= answers.score(answers.write(averaged()))
            totals["valid"], totals["improved"] = lines["all"], patience.saw({"step": step, **lines["all"]})
            for name, line in lines.items():
                line = {"split": f"valid/{name}", "step": step,
                        **{k: v for k, v in line.items() if k not in ("tokens", "examples")}}
                writers.write(line)
                progress.evaluation(line)
        for line in suite.lines(averaged(), step):
            writers.write(line)
            progress.evaluation(line)
        if sample_tokens:
            from jaxlm.generate.decoding import Generator, Request
            from jaxlm.generate.sampling import Sampling

            tokenizer = data.tokenizer
            generator = generator or Generator(model, tokenizer.vocab_size, config.seq_len)
            request = Request(prompt_ids, sample_tokens, Sampling(temperature=0.8, top_k=50), seed=step)
            text = tokenizer.decode([token.id for token in generator.stream(averaged(), [request])])
            writers.text(step, prompt, text)
            progress.sample(text)

    def save(step, evaluated):
        metrics = totals["valid"] if evaluated and totals["valid"] else None
        checkpoints.save(step, without_base(state, base), metrics,
                         {"fingerprint": fingerprint(full_config), "step": step, "frozen": frozen_marks, "base": base})

    def finish(status, exit_code, step):
        alive("saving", SLOW)
        checkpoints.wait()
        progress.stop()
        process_log.write(f"{status} at step {step}")
        if not is_main():
            return None
        summary = summarise(workdir, program, totals, costs[stages[-1]], status=status, exit_code=exit_code, steps=step,
                            flops=totals["flops"], compile_seconds=compile_seconds, elapsed_seconds=time.time() - began)
        summary |= {"stopped_early": patience.exhausted and step < steps,
                    "best": {"step": patience.best_step, metric: patience.best} if patience.best_step else None}
        write_json(os.path.join(workdir, "summary.json"), summary)
        writers.close()
        if wants_report:
            from jaxlm.observe.report import write_report

            write_report(workdir)
        return summary

    # ---- The loop -------------------------------------------------------------------------------------------------------
    stop = StopSignal(start + 1)
    alive("in the first step", SLOW)
    clock = Clock()
    clock.restart(start, totals["tokens"])
    pending = None  # (step, metrics on the device, when it ended if that is known, internals), read back one step late
    in_turn = target.platform() == "cpu"  # a step has ended when `step_fn` returns

    def read_back(item):
        """Metrics of a finished step: the host waits for step n only after n+1 was sent to the device."""
        step, on_device, ended, inside = item
        stage = stage_at(stages, step - 1)
        logged = step % log_every == 0 or step == steps
        wanted = on_device if logged else {k: on_device[k] for k in ("finite", "tokens", "bad_leaf")}
        metrics = {k: v.item() for k, v in jax.device_get(wanted).items()}
        totals["tokens"] += int(metrics["tokens"])
        totals["flops"] += metrics["tokens"] * costs[stage].causal_flops
        if totals["first_step"] is None:
            totals["first_step"] = time.time() - began
        if not metrics["finite"]:
            bad = int(metrics["bad_leaf"])
            where = f"first in the gradient of {names[bad]}" if bad >= 0 else "in the loss"
            message = f"step {step}: non-finite value, {where}"
            if policy == "stop":
                raise Diverged(f"{message}; the state before it was kept. Lower optimizer.learning_rate, or set "
                               "optimizer.nonfinite=skip")
            progress.message(f"{message}; update skipped")
        if logged:
            rates = clock.lap(step, totals["tokens"], ended)
            totals["train_loss"] = metrics["loss"]
            speed = rates["tokens_per_second"]
            if speed and step > start + log_every:  # the first lines hold the warm-up
                totals["speeds"].append(speed)
            line = train_line(step, totals["tokens"], metrics, rates, costs[stage], time.time() - began)
            writers.write(line)
            progress.update(line)
        if inside:
            writers.write(internals_line(step, jax.device_get(inside)))

    step, saving, enough = start, False, patience.exhausted
    batches = batches_of(data.train, programs, start)
    try:
        with jax.transfer_guard("disallow"):
            for step in () if enough else range(start + 1, steps + 1):
                stage = stage_at(stages, step - 1)
                if step == stage.first + 1:  # rates are of one stage
                    if pending:
                        read_back(pending)
                        pending = None
                    clock.restart(step - 1, totals["tokens"])
                    totals["speeds"].clear()
                waited = time.perf_counter()
                batch = next(batches)
                clock.waited(time.perf_counter() - waited)
                if saving:  # once more when it has ended
                    saving = checkpoints.is_saving()
                    heap.give_back_freed_memory()
                # Before the step, which takes the state away.
                inside = looks[stage](state, batch, hyper, *frozen) if look_every and step % look_every == 0 else None
                state, metrics = step_fns[stage](state, batch, hyper, *frozen)
                if pending:
                    read_back(pending)
                pending = (step, metrics, clock.now() if in_turn else None, inside)
                due_eval = step == steps or (eval_every and step % eval_every == 0)
                due_save = step == steps or (save_every and step % save_every == 0)
                stopping = stop.after(step)
                if due_eval or due_save or stopping:
                    read_back(pending)
                    pending = None
                    alive("evaluating or saving", SLOW)
                    if due_eval:
                        with jax.transfer_guard("allow"):
                            run_evaluation(step)
                    enough = due_eval and patience.exhausted
                    if due_save or stopping or enough or (due_eval and keep_best and totals["improved"]):
                        with jax.transfer_guard("allow"):
                            save(step, evaluated=due_eval)  # never with an older step's loss
                    saving = True
                    clock.restart(step, totals["tokens"])
                    if enough:
                        progress.message(f"step {step}: {most} evaluations without a better {metric} than "
                                         f"{patience.best:.4f} at step {patience.best_step}; stopping early")
                        break
                alive()
                if stopping and step < steps:
                    finish("preempted", 75, step)
                    raise Preempted(f"{stop.name} at step {step}: saved; run the same command again to go on")
    except Diverged:
        finish("diverged", 3, step)
        raise
    finally:
        stop.restore()
        batches.close()
        checkpoints.close()
        progress.stop()
    return finish("completed", 0, step)
