"""The trainer: its metrics by hand, weights in place, resume, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from strop.engine.config import InputError, Layout
from strop.engine.parallel.collectives import all_gather_objects
from strop.engine.parallel.mesh import Mesh
from strop.engine.train import microbatches as microbatches_module
from strop.engine.train import step as step_module
from strop.engine.train.nonfinite import NonFiniteError
from strop.engine.train.objective import objective
from strop.engine.train.packing import fill
from strop.engine.train.step import TrainConfig, Trainer
from strop.kernels import LossSpec

RESUMABLE = TrainConfig(
    steps=4, lr=1e-3, warmup_steps=2, lr_schedule="cosine", lr_floor=0.1, minibatches=2, microbatch_tokens=96,
    loss=LossSpec(kl_coef=0.1), kl_refresh_steps=2,
)  # fmt: skip


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_metrics_of_a_step_worked_by_hand(make_policy, make_rollout):
    groups = make_rollout(1)
    trainer = Trainer(make_policy(), Mesh.single(), TrainConfig(steps=10, lr=1e-3, warmup_steps=4))
    _, metrics = trainer.train_on(groups, 1, seed=0)
    samples = [(sample, score) for group in groups for sample, score in zip(group.samples, group.scores, strict=True)]
    rewards = torch.tensor([score.value for _, score in samples if not math.isnan(score.value)])
    expected = {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(correction=0),
        "reward/nonfinite": 1,
        "reward/exact": sum(score.parts["exact"] for _, score in samples) / 24,
        "reward/format": 0.5,
        "groups/mixed": sum(len({s.value for s in group.scores} - {math.nan}) > 1 for group in groups) / 6,
        "response/length": sum(len(sample) for sample, _ in samples) / 24,
        "response/finished": sum(sample.finish_reason == "stop" for sample, _ in samples) / 24,
        "tokens/response": sum(len(sample) for sample, _ in samples),
        "tokens/trained": sum(len(sample) for sample, score in samples if not math.isnan(score.value)),
        "lr": 1e-3 / 4,
        "ratio/mean": 1,
        "ratio/min": 1,
        "ratio/max": 1,
        "clip/low": 0,
        "clip/high": 0,
        "kl/old": 0,
    }
    assert {key: metrics[key] for key in expected} == pytest.approx({key: float(value) for key, value in expected.items()})
    assert 0 < metrics["entropy"] < math.log(37)
    assert 0 < metrics["mismatch/mean"] < metrics["mismatch/max"]
    assert metrics["grad_norm"] > 0
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())


def test_groups_come_back_with_the_advantages_that_trained(run_ranks, make_policy, make_rollout):
    def on_this_rank():
        mesh = Mesh.start(Layout(), "cpu", timeout_seconds=30)
        groups, _ = Trainer(make_policy(), mesh, TrainConfig(steps=1)).train_on(make_rollout(1)[mesh.rank :: 2], 1, seed=0)
        mesh.close()
        return [(group.prompt.id, group.scores, group.advantages) for group in groups]

    given = make_rollout(1)
    for rank, returned in enumerate(run_ranks(2, on_this_rank)):
        for (prompt_id, scores, advantages), group in zip(returned, given[rank::2], strict=True):
            assert prompt_id == group.prompt.id and len(scores) == 4
            rewards = torch.tensor([score.value for score in group.scores])
            known = rewards[~rewards.isnan()]
            expected = ((rewards - known.mean()) / (known.std(correction=0) or 1)).nan_to_num(0.0)
            assert advantages == pytest.approx(expected.tolist(), abs=1e-3)
    assert all(group.advantages == () for group in given), "what was given is left as it was"


def test_mismatch_is_zero_where_the_sampler_had_the_trainers_log_probs(make_policy, make_rollout):
    model = make_policy()
    trainer = Trainer(model, Mesh.single(), TrainConfig(steps=1, lr=1e-2, minibatches=3))
    groups = []
    for group in make_rollout(1):
        samples = []
        for sample in group.samples:
            logprobs = trainer.token_logprobs(torch.cat([group.prompt_tokens, sample.tokens]))[-len(sample) :]
            samples.append(replace(sample, spans=(replace(sample.spans[0], logprobs=logprobs, temperature=1.0),)))
        groups.append(replace(group, samples=tuple(samples)))
    _, metrics = trainer.train_on(groups, 1, seed=0)
    assert metrics["mismatch/max"] < 1e-5, "old log-probs must be those from before the first of the 3 updates"
    assert metrics["ratio/max"] > 1, "the later mini-batches meet a policy that has moved"


def test_parameters_change_in_place(make_policy, make_rollout):
    model = make_policy()
    trainer = Trainer(model, Mesh.single(), TrainConfig(steps=1, lr=1e-3))
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    before = parameters(model)
    trainer.train_on(make_rollout(1), 1, seed=0)
    assert pointers == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert all((parameter - before[name]).abs().max() > 1e-5 for name, parameter in model.named_parameters())


def test_samples_without_gradient_take_a_forward_pass_only_and_change_nothing(monkeypatch, make_policy, make_rollout):
    def run() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        model = make_policy()
        trainer = Trainer(model, Mesh.single(), TrainConfig(steps=2, lr=1e-3, minibatches=2))
        return [trainer.train_on(make_rollout(step), step, seed=0)[1] for step in (1, 2)], parameters(model)

    def all_with_gradient(*args):
        return split(*args[:-1], False)

    short = run()
    split = step_module.microbatches
    monkeypatch.setattr(step_module, "microbatches", all_with_gradient)
    full = run()
    for mine, other in zip(short[0], full[0], strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    for name, value in full[1].items():
        assert (short[1][name] - value).norm() <= 1e-5 * value.norm(), name


def test_padding_to_the_fixed_shape_changes_nothing(monkeypatch, make_policy, make_rollout):
    config = TrainConfig(steps=1, microbatch_tokens=96, microbatch_sequences=30, minibatches=2)
    _, cut = Trainer(make_policy(), Mesh.single(), config).train_on(make_rollout(1), 1, seed=0)
    shapes = set()

    def keep_padding(batch):
        shapes.add((len(batch.tokens), len(batch.cu_seqlens)))
        return batch

    monkeypatch.setattr(microbatches_module, "without_padding", keep_padding)
    _, padded = Trainer(make_policy(), Mesh.single(), config).train_on(make_rollout(1), 1, seed=0)
    assert padded == pytest.approx(cut, rel=1e-5, abs=1e-6)
    assert shapes == {(96, 31)}, "every micro-batch has the same shape"


@pytest.mark.gpu
def test_a_step_on_a_gpu_equals_the_cpus_and_padding_alone_is_exactly_nothing(make_policy, make_rollout):
    config = TrainConfig(steps=1, microbatch_tokens=96, loss=LossSpec(kl_coef=0.1), minibatches=2)
    _, on_cpu = Trainer(make_policy(), Mesh.single(), config).train_on(make_rollout(1), 1, seed=0)
    model = make_policy().to("cuda")
    trainer = Trainer(model, Mesh.single("cuda"), config)
    assert trainer.train_on(make_rollout(1), 1, seed=0)[1] == pytest.approx(on_cpu, rel=1e-3, abs=1e-4)
    padding = replace(fill([], 96, 8), ref_logprob=torch.zeros(96)).to(torch.device("cuda"))
    loss = objective(model, padding, config.loss, 1, 96).loss
    loss.backward()
    assert float(loss) == 0.0 and trainer.optimizer.reduce_gradients() == 0.0


def test_bf16_parameters_train_in_place_close_to_fp32(make_policy, make_rollout):
    metrics = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_policy(dtype=dtype)
        trainer = Trainer(model, Mesh.single(), TrainConfig(steps=1, lr=1e-2))
        _, metrics[dtype] = trainer.train_on(make_rollout(1), 1, seed=0)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert metrics[torch.bfloat16]["entropy"] == pytest.approx(metrics[torch.float32]["entropy"], rel=2e-2)
    assert metrics[torch.bfloat16]["grad_norm"] == pytest.approx(metrics[torch.float32]["grad_norm"], rel=5e-2)


def test_the_reference_follows_every_second_step(make_policy, make_rollout):
    model = make_policy()
    trainer = Trainer(model, Mesh.single(), replace(RESUMABLE, minibatches=1))
    kl = [trainer.train_on(make_rollout(step), step, seed=0)[1]["kl/ref"] for step in (1, 2, 3, 4)]
    assert kl[0] == kl[2] == 0.0, "a fresh copy of the policy has no distance to it"
    assert kl[1] > 0 and kl[3] > 0
    assert all(torch.equal(p, q) for p, q in zip(trainer.reference.parameters(), model.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in trainer.reference.parameters())


def test_a_step_without_a_usable_reward_changes_nothing(make_policy, make_rollout):
    model = make_policy()
    before = parameters(model)
    groups = [replace(g, scores=tuple(replace(s, value=math.nan) for s in g.scores)) for g in make_rollout(1)]
    _, metrics = Trainer(model, Mesh.single(), TrainConfig(steps=1, lr=1.0)).train_on(groups, 1, seed=0)
    assert metrics["reward/nonfinite"] == 24
    assert not {"reward/mean", "loss", "grad_norm"} & metrics.keys()
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


def test_a_resume_continues_bit_for_bit_and_another_rank_count_reads_the_same_state(
    run_ranks, make_policy, make_rollout, tmp_path
):
    def run(first: int, last: int, load: bool = False, save: bool = False):
        mesh = Mesh.start(Layout(), "cpu", timeout_seconds=30)
        model = make_policy()
        trainer = Trainer(model, mesh, RESUMABLE)
        if load:
            dcp.load(trainer.state_dict(), checkpoint_id=tmp_path)  # in place
        metrics = [
            trainer.train_on(make_rollout(step)[mesh.rank :: mesh.world_size], step, seed=0)[1]
            for step in range(first, last + 1)
        ]
        if save:
            dcp.save(trainer.state_dict(), checkpoint_id=tmp_path)
        loaded = flat(trainer.state_dict())
        mesh.close()
        return metrics, parameters(model), loaded

    whole_metrics, whole, _ = run_ranks(2, run, 1, 4)[0]
    run_ranks(2, run, 1, 3, False, True)
    metrics, resumed, _ = run_ranks(2, run, 4, 4, True)[1]
    assert metrics == whole_metrics[3:]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())

    *_, of_two = run_ranks(2, run, 5, 4, True)[0]
    *_, of_one = run_ranks(1, run, 5, 4, True)[0]
    assert of_one.keys() == of_two.keys()
    assert all(torch.equal(of_one[name], value) for name, value in of_two.items())
    metrics, resumed, _ = run_ranks(1, run, 4, 4, True)[0]
    assert metrics[0] == pytest.approx(whole_metrics[3], rel=1e-5, abs=1e-6)


def flat(state, above: str = "") -> dict[str, torch.Tensor]:
    flattened = {}
    for name, value in state.items():
        if isinstance(value, dict):
            flattened |= flat(value, f"{above}{name}.")
        else:
            flattened[above + name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
    return flattened


def expect_nonfinite(make_policy, make_rollout, plant) -> tuple[str, bool]:
    """On each rank: (the error's text, whether parameters are untouched)."""
    mesh = Mesh.start(Layout(), "cpu", timeout_seconds=30)
    model = make_policy()
    trainer = Trainer(model, mesh, TrainConfig(steps=1, microbatch_tokens=96, loss=LossSpec(correction="tis")))
    before = parameters(model)
    groups = make_rollout(1)[mesh.rank :: mesh.world_size]
    with pytest.raises(NonFiniteError) as caught:
        trainer.train_on(plant(mesh, model, groups), 1, seed=0)
    untouched = all(torch.equal(value, before[name]) for name, value in parameters(model).items())
    mesh.close()
    return str(caught.value), untouched


def test_a_nan_among_the_inputs_stops_every_rank_before_the_update_and_is_named(run_ranks, make_policy, make_rollout):
    def nan_on_rank_1(mesh, model, groups):
        if mesh.rank == 1:
            groups[0].samples[3].spans[0].logprobs[0] = math.nan
        return groups

    first, second = run_ranks(2, expect_nonfinite, make_policy, make_rollout, nan_on_rank_1)
    assert first == second
    message, untouched = first
    assert untouched
    assert message.startswith("step 1, mini-batch 0: loss nan, gradient norm nan")
    assert "no parameter was changed by this update" in message
    assert "rank 1, micro-batch" in message and "rank 0" not in message
    assert "rollout_logprob, loss, gradient of " in message
    assert str(make_rollout(1)[1].samples[3].id) in message.partition("samples")[2]


def test_a_gradient_that_overflows_on_one_rank_is_named_with_its_parameter(run_ranks, make_policy, make_rollout):
    def inf_on_rank_0(mesh, model, groups):
        if mesh.rank == 0:
            model.final_norm.weight.register_hook(lambda gradient: gradient * math.inf)
        return groups

    first, second = run_ranks(2, expect_nonfinite, make_policy, make_rollout, inf_on_rank_0)
    assert first == second
    message, untouched = first
    assert untouched
    assert "loss nan" not in message
    assert "rank 0, micro-batch 0" in message and "gradient of final_norm.weight" in message and "rank 1" not in message


def test_what_all_ranks_refuse_together(run_ranks, make_policy, make_rollout):
    def on_this_rank() -> list[str]:
        mesh = Mesh.start(Layout(), "cpu", timeout_seconds=30)
        messages = []
        with pytest.raises(RuntimeError, match="start from different parameters") as caught:
            Trainer(make_policy(seed=mesh.rank), mesh, TrainConfig())
        messages.append(str(caught.value))
        trainer = Trainer(make_policy(), mesh, TrainConfig(microbatch_tokens=16))
        groups = make_rollout(1)[:1] if mesh.rank == 1 else []
        with pytest.raises(InputError, match=r"--train.microbatch-tokens 16 is too small for") as caught:
            trainer.train_on(groups, 1, seed=0)
        messages.append(str(caught.value))
        with pytest.raises(ValueError, match="occur more than once in a step") as caught:
            trainer.train_on(make_rollout(1), 1, seed=0)
        messages.append(str(caught.value))
        agree = all_gather_objects(messages, mesh.world)
        mesh.close()
        return agree

    assert all(agree[0] == agree[1] for agree in run_ranks(2, on_this_rank))


def test_unscored_groups_and_a_needless_reference_are_refused(make_policy, make_rollout):
    trainer = Trainer(make_policy(), Mesh.single(), TrainConfig())
    with pytest.raises(ValueError, match="prompt 1-0 has 4 samples but 0 scores"):
        trainer.train_on([replace(make_rollout(1)[0], scores=())], 1, seed=0)
    with pytest.raises(ValueError, match="reference policy is of no use"):
        Trainer(make_policy(), Mesh.single(), TrainConfig(), reference=make_policy())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "--train.steps 0: must be at least 1"),
        ({"microbatch_tokens": 0}, "--train.microbatch-tokens 0"),
        ({"lr": -1e-6}, "--train.lr -1e-06: must be a number of at least 0"),
        ({"lr": math.nan}, "--train.lr nan"),
        ({"warmup_steps": 101}, "--train.warmup-steps 101"),
        ({"lr_floor": 0.1}, "--train.lr-floor 0.1 has no effect with --train.lr-schedule constant"),
        ({"kl_refresh_steps": 400}, "--train.kl-refresh-steps 400 has no effect without a KL term"),
        ({"constant_length": 16}, "--train.constant-length 16 with --train.loss.aggregation sequence-mean"),
        ({"loss": LossSpec(aggregation="constant")}, "--train.constant-length 0 with --train.loss.aggregation constant"),
    ],
)
def test_contradictory_settings_are_refused_by_flag(settings, message):
    with pytest.raises(InputError) as caught:
        TrainConfig(**settings)
    assert message in str(caught.value)
