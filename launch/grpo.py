"""GRPO, as DeepSeek-R1 does it (arXiv 2501.12948, section 2.2.1): sample a group of responses to each question, score them by
rule, and push the policy towards those that beat their group's mean.

    torchrun --nproc-per-node 2 launch/grpo.py smollm2          two processes, CPU or GPU
    python launch/grpo.py tiny --train.steps 10                 one process, seconds

This file is the loop. Rollouts come from an engine inside these processes whose weights are the trainer's own storage.
"""

try:
    from strop.launch.command_line import next_command, parse
except ImportError as missing:
    raise SystemExit(f"{missing}: install strop first, pip install -e '.[train]' in the repository (see README.md)") from None

import sys
import time
from dataclasses import replace
from typing import Any

import torch

from strop.engine.config import InputError
from strop.engine.data.prompts import PromptStream, load_prompts
from strop.engine.evaluate.benchmark import summarize
from strop.engine.model.checkpoint import save_hf_folder
from strop.engine.parallel.collectives import all_gather_objects, all_reduce, barrier
from strop.engine.parallel.mesh import Mesh
from strop.engine.reward.rules import Rewards
from strop.engine.run.failure import INTERRUPTED_EXIT_CODE, FailureReport
from strop.engine.run.folder import RunFolder
from strop.engine.run.interrupt import Interrupt
from strop.engine.run.metrics import ACCURACY, TOKENS_PER_SECOND, MetricsLog, SampleLog, read_metrics
from strop.engine.run.plots import draw_plots
from strop.engine.run.progress import RunProgress, Summary
from strop.engine.run.state import Checkpoints
from strop.engine.run.telemetry import Telemetry
from strop.engine.run.watchdog import Watchdog
from strop.engine.train.packing import require_fitting
from strop.engine.train.step import Trainer
from strop.launch.assembly import Policy, ask_everyone
from strop.launch.planned import plan_grpo
from strop.launch.presets import GRPO_PRESETS, GrpoConfig


def main() -> None:
    with FailureReport() as failure:
        preset, config = parse(GRPO_PRESETS, "Train a language model with GRPO.", plan=plan_grpo)
        mesh = Mesh.start(config.layout, config.device)
        config = replace(config, layout=mesh.layout)
        folder = RunFolder.open(
            config.run, config, preset, rank=mesh.rank, share=lambda value: all_gather_objects(value, mesh.world)[0]
        )
        failure.folder = folder.path
        with Watchdog(config.run.stall_seconds, folder.path) as watchdog, Interrupt() as interrupt:
            interrupted = train(config, mesh, folder, watchdog, interrupt)
        mesh.close()
    sys.exit(INTERRUPTED_EXIT_CODE if interrupted else 0)


def train(config: GrpoConfig, mesh: Mesh, folder: RunFolder, watchdog: Watchdog, interrupt: Interrupt) -> bool:
    """The run, from the first step (or the newest checkpoint) to the last; True when a Ctrl-C ended it early."""
    started = time.perf_counter()
    prompts_per_step, group_size = config.rollout.prompts_per_step, config.rollout.group_size
    if prompts_per_step < mesh.dp.size:
        raise InputError(
            f"--rollout.prompts-per-step {prompts_per_step} leaves some of the {mesh.dp.size} data-parallel ranks without a "
            f"prompt: at least {mesh.dp.size}, or start fewer ranks"
        )
    policy = Policy.load(config.model, config.precision, mesh.device)
    prompts = load_prompts(config.data, config.seed)
    stream = PromptStream(prompts.train, config.seed)
    identity = {"questions": prompts.digest, "model": policy.checksum()}  # a resume needs the same ones
    trainer = Trainer(policy.model, mesh, config.train)
    rollout = policy.engine(config.rollout, config.data.template, trainer.token_logprobs, watchdog.beat)
    checkpoints = Checkpoints(
        folder.checkpoints, keep=config.run.keep, settings_digest=folder.settings_digest, rank=mesh.rank,
        group=mesh.new_gloo_group(),
    )  # fmt: skip
    step, state = 0, {"cursor": 0, "metrics_bytes": 0, "samples_bytes": 0}
    if config.run.resume and checkpoints.latest() is not None:
        step = checkpoints.latest()
        state = checkpoints.load(step, trainer.state_dict())
        refuse_other_inputs(identity, state)
    refuse_passed_stop(config, step)
    stream.cursor = state["cursor"]
    log = MetricsLog(folder.metrics, folder.tensorboard, rank=mesh.rank, keep_bytes=state["metrics_bytes"], after_step=step)
    samples = SampleLog(folder.samples, rank=mesh.rank, keep_bytes=state["samples_bytes"])
    telemetry = Telemetry(mesh.device)
    watched = RunProgress(config.train.steps, watchdog, done_steps=step, rank=mesh.rank)

    with Rewards(config.reward, seed=config.seed, beat=watchdog.beat) as rewards, watched as progress:
        rewards.check([*prompts.train, *prompts.held_out])
        longest = rollout.check([*prompts.train, *prompts.held_out], config.rollout.sampling(config.seed))
        require_fitting([longest], config.train.microbatch_tokens)
        rollout.sync_weights(step)

        def evaluate() -> dict[str, float]:
            records = ask_everyone(rollout, rewards, prompts.held_out, config.eval, mesh, config.seed)
            return {f"eval/{name}": value for name, value in summarize(records, config.eval).items()}

        if step == 0 and prompts.held_out:
            with progress.phase("evaluate"):
                values = evaluate()
            log.log(0, values | progress.take_times())
            if ACCURACY in values:
                progress.note(f"before training: {values[ACCURACY]:.3f} of the held-out questions right")
        stop, interrupted = step >= config.train.steps, False
        while not stop:
            step += 1
            began = time.perf_counter()
            with progress.phase("rollout"):
                rollout.wake("kv_cache")
                asked = stream.take(prompts_per_step)[mesh.dp.rank :: mesh.dp.size]
                first_ids = [ordinal * group_size for ordinal, _ in asked]
                groups = rollout.generate([prompt for _, prompt in asked], config.rollout.sampling(config.seed), first_ids)
                rollout.sleep("kv_cache")
            with progress.phase("reward"):
                groups = rewards.score(groups, step=step)
            with progress.phase("train"):
                groups, values = trainer.train_on(groups, step, config.seed)
            with progress.phase("sync"):
                rollout.wake("kv_cache")
                values |= {"time/sync_seconds": rollout.sync_weights(step).seconds, "mismatch/probe": rollout.probe_difference}
            values[TOKENS_PER_SECOND] = values["tokens/response"] / (time.perf_counter() - began)
            is_last = step == config.train.steps
            interrupted = bool(all_reduce(torch.tensor(float(interrupt.requested)), mesh.world, "max")) and not is_last
            is_due = is_last or (config.eval_every and step % config.eval_every == 0)
            if prompts.held_out and is_due and not interrupted:
                with progress.phase("evaluate"):
                    values |= evaluate()

            values |= progress.take_times() | trainer.take_times() | checkpoints.poll() | telemetry.sample()
            log.log(step, values)
            samples.log(step, groups[: config.run.sample_groups])
            progress.step(step, values)
            stop = is_last or interrupted or step == config.run.stop_at
            if stop or step % config.run.save_every == 0:
                with progress.phase("save"):
                    positions = {"metrics_bytes": log.position(), "samples_bytes": samples.position()}
                    checkpoints.save(step, trainer.state_dict(), {"cursor": stream.cursor} | identity | positions)
        with progress.phase("save"):
            checkpoints.finish()
            if mesh.rank == 0:
                if step == config.train.steps and not (folder.path / "model").exists():
                    save_hf_folder(policy.model, folder.path / "model", tokenizer_from=policy.folder)
                draw_plots(folder.metrics, folder.plots)
            barrier(mesh.world)
    if mesh.rank == 0:
        summarize_run(config, folder, step, interrupted, time.perf_counter() - started).show(progress.console)
    return interrupted


def refuse_other_inputs(identity: dict[str, str], state: dict[str, Any]) -> None:
    """InputError where the questions or the first model are no longer those that the checkpoint's run began with."""
    for name, digest in identity.items():
        if state[name] != digest:
            raise InputError(
                f"--run.resume: the {name} changed since the run began (digest {state[name][:12]}, now {digest[:12]}): "
                f"restore the {name}, or start a new run"
            )


def refuse_passed_stop(config: GrpoConfig, step: int) -> None:
    stop = config.run.stop_at
    if stop is not None and not step < stop <= config.train.steps:
        raise InputError(
            f"--run.stop-at {stop}: the run is at step {step} and ends at --train.steps {config.train.steps}: "
            "take a step after the one and not after the other"
        )


def summarize_run(config: GrpoConfig, folder: RunFolder, step: int, interrupted: bool, seconds: float) -> Summary:
    measured = [(row[ACCURACY], row["step"]) for row in read_metrics(folder.metrics) if ACCURACY in row]
    before = next((accuracy for accuracy, at in measured if at == 0), None)
    after = next((accuracy for accuracy, at in measured if at == step > 0), None)
    if step == config.train.steps:
        outcome, compared = "finished", ("--seed", "--device", "--precision", "--data.", "--reward.", "--eval.")
        again = next_command("evaluate.py", lambda flag: flag.startswith(compared), "--model", str(folder.path / "model"))
        commands = {"evaluate": again}
    else:
        outcome = "interrupted" if interrupted else f"stopped (--run.stop-at {step})"
        replaced = ("--run.dir", "--run.resume", "--run.no-resume", "--run.stop-at")
        again = next_command("grpo.py", lambda flag: flag not in replaced, "--run.dir", str(folder.path), "--run.resume")
        commands = {"resume": again}
    best = max(measured, key=lambda pair: pair[0], default=None)
    return Summary(outcome, step, config.train.steps, seconds, folder.path, before, after, best, commands)


if __name__ == "__main__":
    main()
