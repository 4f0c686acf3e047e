"""The engine on the tiny model: what it generates doesn't depend on how the work was scheduled, and ends where it should."""

import random

import pytest
import torch

from strop.engine.batch import Prompt
from strop.engine.config import InputError
from strop.engine.protocols import Sampling


def tokens_of(groups):
    return [[sample.tokens.tolist() for sample in group.samples] for group in groups]


def ids_for(prompts, n):
    return [1000 * (1 + int(prompt.id[1:])) for prompt in prompts]


def check_logprobs(lab, groups, limit):
    """Both log-probs of every token against a packed forward of the trainer over the whole sequence. Returns the worst."""
    worst = 0.0
    for group in groups:
        for sample in group.samples:
            expected = lab.logprobs(torch.cat([group.prompt_tokens, sample.tokens]))[len(group.prompt_tokens) - 1 :]
            raw = torch.cat([span.raw_logprobs for span in sample.spans])
            assert len(raw) == len(sample)
            worst = max(worst, (raw - expected).abs().max().item())
    assert worst <= limit
    return worst


def test_rollout_logprobs_equal_a_trainer_forward(lab, prompts, record_property):
    """DESIGN section 3: at most 1e-5 in fp32 on the tiny model."""
    groups = lab.engine().generate(prompts, Sampling(n=6, max_new_tokens=60, seed=5))
    record_property("largest difference", check_logprobs(lab, groups, 1e-5))
    assert all(torch.equal(s.spans[0].logprobs, s.spans[0].raw_logprobs) for group in groups for s in group.samples)


def test_greedy_is_the_argmax_of_full_forwards(sharp_lab, prompts):
    """Against the slowest possible generator: the whole sequence again for every token."""
    engine = sharp_lab.engine()
    for group in engine.generate(prompts, Sampling(temperature=0, max_new_tokens=20)):
        tokens = group.prompt_tokens.tolist()
        for token in group.samples[0].tokens.tolist():
            assert token == sharp_lab.logits(torch.tensor(tokens))[-1].argmax().item()
            tokens.append(token)


SCHEDULES = {
    "one row": {"max_batch": 1},
    "three rows": {"max_batch": 3, "block_size": 4},
    "odd blocks": {"block_size": 7, "max_batch": 11},
    "prompts in chunks of 6 tokens": {"fill_tokens": 6, "block_size": 4},
    "one token a block": {"block_size": 1, "max_batch": 20},
    "few blocks": {"block_size": 4, "max_batch": 16, "blocks": 40},
    "hardly any blocks": {"block_size": 4, "max_batch": 8, "blocks": 19, "fill_tokens": 9},
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_samples_do_not_depend_on_the_schedule(sharp_lab, prompts, schedule):
    """Batch size, block size, chunked prompts, preemption, order of the prompts: the same tokens, log-probs to 1e-5."""
    sampling = Sampling(n=3, max_new_tokens=24, temperature=0.8, top_k=30, seed=11)
    expected = sharp_lab.engine().generate(prompts, sampling, ids_for(prompts, 3))
    settings = dict(SCHEDULES[schedule])
    blocks = settings.pop("blocks", None)
    shuffled = random.Random(0).sample(prompts, len(prompts))
    engine = sharp_lab.engine(**settings, **({} if blocks is None else sharp_lab.cache_of(blocks, settings["block_size"])))
    groups = engine.generate(shuffled, sampling, ids_for(shuffled, 3))
    assert [group.prompt.id for group in groups] == [prompt.id for prompt in shuffled]
    by_id = {group.prompt.id: group for group in groups}
    for group in expected:
        assert tokens_of([by_id[group.prompt.id]]) == tokens_of([group])
        for one, other in zip(group.samples, by_id[group.prompt.id].samples, strict=True):
            assert one.id == other.id and one.text == other.text and one.finish_reason == other.finish_reason
            assert (one.spans[0].logprobs - other.spans[0].logprobs).abs().max() < 1e-5
    assert (engine.num_preemptions > 0) == (blocks is not None)
    assert engine._scheduler.allocator.num_free == engine._scheduler.allocator.num_blocks


def test_random_schedules(sharp_lab):
    """Random workloads in random cache sizes; every one finishes, with the samples of an unconstrained engine."""
    choose, roomy = random.Random(3), sharp_lab.engine()
    for _ in range(15):
        prompts = [Prompt(id=f"p{i}", source="t", text="x" * choose.randint(1, 20)) for i in range(choose.randint(1, 6))]
        sampling = Sampling(n=choose.randint(1, 5), max_new_tokens=choose.randint(1, 9), seed=choose.randint(0, 99))
        block_size = choose.choice([1, 2, 4, 16])
        needed = max(-(-(len(p.text) + sampling.max_new_tokens) // block_size) for p in prompts) + 1
        engine = sharp_lab.engine(
            max_batch=choose.randint(1, 9),
            block_size=block_size,
            fill_tokens=choose.randint(1, 50),
            **sharp_lab.cache_of(needed + choose.randint(0, 8), block_size),
        )
        ids = ids_for(prompts, sampling.n)
        assert tokens_of(engine.generate(prompts, sampling, ids)) == tokens_of(roomy.generate(prompts, sampling, ids))
        assert engine._scheduler.allocator.num_free == engine._scheduler.allocator.num_blocks


def test_a_group_s_prompt_is_computed_once_and_no_token_twice(lab, prompts):
    engine = lab.engine()
    before = engine.tokens_forwarded
    groups = engine.generate(prompts, Sampling(n=5, max_new_tokens=12))
    responses = sum(len(sample) - 1 for group in groups for sample in group.samples)  # the last token is never fed
    assert engine.tokens_forwarded - before == sum(len(group.prompt_tokens) for group in groups) + responses


def test_no_row_idles_while_work_waits(lab, prompts, monkeypatch):
    """40 responses of very different lengths through 8 rows: a row is empty only while a prompt for it is being computed."""
    engine, idle, unfinished = lab.engine(max_batch=8), [], 40
    schedule = engine._scheduler.schedule

    def watch():
        step = schedule()
        if not step.chunks:
            idle.append(min(8, unfinished) - len(step.running))
        return step

    monkeypatch.setattr(engine._scheduler, "schedule", watch)
    for prompt, length in zip(prompts, [3, 20, 7, 1, 14, 5, 11, 2], strict=True):
        engine.submit(prompt, Sampling(n=5, max_new_tokens=length))
    while unfinished:
        unfinished -= len(engine.step())
    assert len(idle) > 20 and not any(idle)


def test_shared_prefix_blocks_are_shared(lab):
    """16 samples over a prompt of 20 blocks take 20 blocks and one or two each, not 16 x 21."""
    engine = lab.engine(block_size=4, max_batch=16)
    engine.submit(Prompt(id="p0", source="t", text="a" * 81), Sampling(n=16, max_new_tokens=4, stop_ids=()))
    engine.step()
    engine.step()
    allocator = engine._scheduler.allocator
    assert allocator.num_blocks - allocator.num_free <= 20 + 16
    engine.abort()
    assert allocator.num_free == allocator.num_blocks


def test_ids_alone_select_the_random_numbers(lab, prompts):
    sampling = Sampling(n=2, max_new_tokens=8, seed=4)
    engine = lab.engine()
    first = engine.generate(prompts, sampling, range(100, 116, 2))
    again = lab.engine().generate(prompts[3:5], sampling, [106, 108])
    assert tokens_of(first)[3:5] == tokens_of(again)
    own = engine.generate(prompts[:1], sampling)  # the engine's own counter goes on after the largest id it has seen
    assert [sample.id for sample in own[0].samples] == [116, 117]
    assert tokens_of(engine.generate(prompts[:1], sampling, [500])) != tokens_of(engine.generate(prompts[:1], sampling, [600]))
    other_seed = engine.generate(prompts, Sampling(n=2, max_new_tokens=8, seed=5), range(100, 116, 2))
    assert tokens_of(other_seed) != tokens_of(first)
    for ids in ([0, 1], [-1, 5], [2**63 - 1, 3]):
        with pytest.raises(ValueError, match="sample ids"):
            engine.generate(prompts[:2], sampling, ids)
    assert engine.step() == []


def test_submit_and_step_give_what_generate_gives(lab, prompts):
    sampling = Sampling(n=3, max_new_tokens=10, seed=2)
    expected = {s.id: s.tokens.tolist() for g in lab.engine().generate(prompts, sampling) for s in g.samples}
    engine = lab.engine(max_batch=5)
    ids = [engine.submit(prompt, sampling) for prompt in prompts]
    assert ids == list(range(0, 24, 3))
    done = {}
    for _ in range(3):
        done |= {s.id: s.tokens.tolist() for s in engine.step()}
    # A whole generation in the midst of it keeps apart from the submissions.
    other = engine.generate(prompts[:2], Sampling(n=2, max_new_tokens=30, temperature=0), [900, 910])
    assert [s.id for g in other for s in g.samples] == [900, 901, 910, 911]
    while finished := engine.step() or engine._scheduler.requests:
        done |= {s.id: s.tokens.tolist() for s in finished} if isinstance(finished, list) else {}
    assert done == expected


def test_a_generation_beats_after_every_forward_pass(lab, prompts, monkeypatch):
    engine, beats, passes = lab.engine(max_batch=4), [], []
    monkeypatch.setattr(engine, "_beat", lambda: beats.append(len(passes)))
    schedule = engine._scheduler.schedule
    monkeypatch.setattr(engine._scheduler, "schedule", lambda: passes.append(1) or schedule())
    engine.generate(prompts, Sampling(n=2, max_new_tokens=5, stop_ids=()))
    assert len(passes) > 10 and beats == list(range(1, len(passes) + 1))


def test_abort_drops_submissions(lab, prompts):
    engine = lab.engine(max_batch=4)
    ids = [engine.submit(prompt, Sampling(n=2, max_new_tokens=9)) for prompt in prompts[:3]]
    engine.step(), engine.step()
    engine.abort([ids[1]])
    engine.abort([ids[1]])
    finished = [sample.id for _ in range(40) for sample in engine.step()]
    assert sorted(finished) == [ids[0], ids[0] + 1, ids[2], ids[2] + 1]
    with pytest.raises(ValueError, match="no such submission"):
        engine.abort([77])
    engine.submit(prompts[0], Sampling())
    engine.abort()
    assert engine.step() == [] and engine._scheduler.allocator.num_free == engine._scheduler.allocator.num_blocks


def test_length_limits(lab, prompts):
    context = lab.model.config.max_positions
    engine = lab.engine(max_batch=2)
    assert {len(s) for g in engine.generate(prompts, Sampling(max_new_tokens=1)) for s in g.samples} == {1}
    nearly_full = Prompt(id="p0", source="t", text="b" * (context - 3))
    sample = engine.generate([nearly_full], Sampling(max_new_tokens=50, temperature=0))[0].samples[0]
    assert (len(sample), sample.finish_reason) == (3, "length")
    fed = torch.tensor(lab.encode(nearly_full) + sample.tokens[:-1].tolist())
    assert sample.tokens[-1] == lab.logits(fed)[-1].argmax()
    full = Prompt(id="p1", source="t", text="b" * (context - 1))
    assert len(engine.generate([full], Sampling(max_new_tokens=50))[0].samples[0]) == 1


def test_unusable_prompts_are_refused_before_anything_is_generated(lab, prompts):
    engine, context = lab.engine(), lab.model.config.max_positions
    before = engine.tokens_forwarded
    too_long = Prompt(id="long-1", source="algebra", text="b" * context)
    cases = [
        (too_long, rf"'long-1' \(source 'algebra'\) has {context} tokens.* is {context}: at most {context - 1} .*shorten"),
        (Prompt(id="none", source="algebra", text=""), r"'none' \(source 'algebra'\) is empty.*remove it"),
    ]
    for bad, message in cases:
        with pytest.raises(InputError, match=message):
            engine.generate([*prompts, bad], Sampling())
        with pytest.raises(InputError, match=message):
            engine.submit(bad, Sampling())
    longest = engine.check(prompts, Sampling(max_new_tokens=30))
    assert longest == max(len(lab.encode(prompt)) for prompt in prompts) + 30
    with pytest.raises(InputError, match="'long-1'"):
        engine.check([*prompts, too_long], Sampling())
    engine._encode = lambda prompt: [5, 999_999]
    with pytest.raises(InputError, match=r"token id 999999.*wrong tokenizer"):
        engine.generate(prompts, Sampling())
    small = lab.engine(**lab.cache_of(5, 16))
    with pytest.raises(InputError, match=r"needs 8 cache blocks, there are 5: --rollout.kv-cache-gib .* must be at least"):
        small.generate([Prompt(id="p0", source="t", text="b" * 40)], Sampling(max_new_tokens=60))
    assert engine.tokens_forwarded == before and engine.step() == []


def test_truncation_is_recorded_for_replay(lab, prompts):
    """keep_mask and logprobs let a trainer recompute the distribution that was sampled from."""
    plain = Sampling(n=2, max_new_tokens=9, temperature=0.7)
    cut = Sampling(n=2, max_new_tokens=9, temperature=1.3, top_p=0.6, top_k=40)
    engine = lab.engine()
    ids = [engine.submit(prompt, cut if i % 2 else plain) for i, prompt in enumerate(prompts)]
    samples = {}
    while len(samples) < 16:
        samples |= {sample.id: sample for sample in engine.step()}
    for i, (first, prompt) in enumerate(zip(ids, prompts, strict=True)):
        prompt_tokens = torch.tensor(lab.encode(prompt))
        for span in (samples[first].spans[0], samples[first + 1].spans[0]):
            assert (span.keep_mask is not None) == bool(i % 2) and span.temperature == (1.3 if i % 2 else 0.7)
            logits = lab.logits(torch.cat([prompt_tokens, span.tokens]))[len(prompt_tokens) - 1 : -1] / span.temperature
            if span.keep_mask is not None:
                assert span.keep_mask.shape == logits.shape and span.keep_mask.sum(1).max() <= 40
                logits = logits.masked_fill(~span.keep_mask, -torch.inf)
            expected = logits.log_softmax(1).gather(1, span.tokens[:, None]).squeeze(1)
            assert (span.logprobs - expected).abs().max() < 1e-5


def test_training_goes_on_after_generation(lab, prompts):
    """The samples are ordinary tensors, the weights too; an optimizer step shows in the next rollout without any copy."""
    engine = lab.engine()
    sampling = Sampling(n=2, max_new_tokens=6, temperature=0)
    before = engine.generate(prompts, sampling)
    spans = [sample.spans[0] for group in before for sample in group.samples]
    assert not any(t.is_inference() for s in spans for t in (s.tokens, s.logprobs, s.raw_logprobs))
    target = 17
    optimizer = torch.optim.SGD(lab.model.parameters(), lr=1.0)
    for _ in range(12):
        loss = -lab.logits(before[0].prompt_tokens, grad=True).log_softmax(1)[:, target].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.sync_weights(1).bytes_moved == 0
    after = engine.generate(prompts, sampling)
    assert after[0].samples[0].tokens[:3].tolist() == [target] * 3 and tokens_of(before) != tokens_of(after)
    assert after[0].samples[0].spans[0].weight_version == 1
    check_logprobs(lab, after, 1e-5)


def test_new_weights_in_the_midst_of_a_response(sharp_lab, prompts):
    """Responses keep their tokens, the cache is computed anew, and the rest is a second span of the new version."""
    engine = sharp_lab.engine(max_batch=6)
    ids = [engine.submit(prompt, Sampling(n=2, max_new_tokens=12, seed=1)) for prompt in prompts]
    samples = [sample for _ in range(8) for sample in engine.step()]
    old = {name: parameter.detach().clone() for name, parameter in sharp_lab.model.named_parameters()}
    with torch.no_grad():
        for parameter in sharp_lab.model.parameters():
            parameter.mul_(1.05)
    engine.sync_weights(1)
    while len(samples) < 16:
        samples += engine.step()
    split = [sample for sample in samples if len(sample.spans) == 2]
    assert split and all([span.weight_version for span in sample.spans] == [0, 1] for sample in split)
    versions = {span.weight_version for sample in samples for span in sample.spans}
    assert versions == {0, 1}
    new = {name: parameter.detach().clone() for name, parameter in sharp_lab.model.named_parameters()}
    for version, weights in ((0, old), (1, new)):
        sharp_lab.model.load_state_dict(weights)
        for sample in samples:
            prompt_tokens = torch.tensor(sharp_lab.encode(prompts[ids.index(sample.id - sample.id % 2)]))
            expected = sharp_lab.logprobs(torch.cat([prompt_tokens, sample.tokens]))[len(prompt_tokens) - 1 :]
            got = torch.cat([span.raw_logprobs for span in sample.spans])
            mine = torch.cat([torch.full((len(span.tokens),), span.weight_version == version) for span in sample.spans])
            assert mine.sum() == 0 or (got - expected)[mine].abs().max() < 1e-5


def test_sleep_gives_the_cache_back_and_responses_go_on_after_wake(lab, prompts):
    sampling = Sampling(n=2, max_new_tokens=15, seed=9)
    expected = tokens_of(lab.engine().generate(prompts, sampling))
    engine = lab.engine(max_batch=7)
    for prompt in prompts:
        engine.submit(prompt, sampling)
    samples = [sample for _ in range(6) for sample in engine.step()]
    engine.sleep("all")
    assert engine._paged._cache is None
    with pytest.raises(RuntimeError, match="kv_cache and weights sleep: call wake"):
        engine.step()
    engine.wake("kv_cache")
    with pytest.raises(RuntimeError, match="weights sleep: call wake"):
        engine.sync_weights(0)
    engine.wake("weights")
    while len(samples) < 16:
        samples += engine.step()
    by_id = {sample.id: sample.tokens.tolist() for sample in samples}
    assert [[by_id[2 * i], by_id[2 * i + 1]] for i in range(8)] == expected
    with pytest.raises(ValueError, match="'caches'"):
        engine.sleep("caches")


def test_logits_that_are_not_finite_stop_the_run(lab, prompts):
    engine = lab.engine()
    with torch.no_grad():
        lab.model.final_norm.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"weights version 0 .* sample 0 of prompt 'p0' at response position 0"):
        engine.generate(prompts, Sampling())
    with torch.no_grad():
        lab.model.final_norm.weight[3] = 1.0
    assert engine.step() == [] and len(engine.generate(prompts, Sampling())) == 8
