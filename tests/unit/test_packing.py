"""Micro-batches: every sample once, within the budget, the fields at the right places, whatever the order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.batch import IGNORE_INDEX, Sample, Span
from strop.engine.config import InputError
from strop.engine.train.packing import Example, best_fit, fill, pack, without_padding

BUDGET, MAX_SEQUENCES = 40, 5
lengths_lists = st.lists(st.integers(1, BUDGET), max_size=40)


def span(tokens: list[int], trainable: bool = True, temperature: float = 0.7, **extra) -> Span:
    logprobs = -torch.tensor(tokens, dtype=torch.float32) / 100
    return Span(torch.tensor(tokens), trainable, 0, logprobs, logprobs, temperature, **extra)


def example(sample_id: int, prompt: int, response: int) -> Example:
    """Tokens tell where they come from: sample id * 1000 + position."""
    tokens = [sample_id * 1000 + position for position in range(prompt + response)]
    sample = Sample(sample_id, (span(tokens[prompt:]),), "stop", "")
    return Example(torch.tensor(tokens[:prompt]), sample, advantage=sample_id + 0.5)


@settings(deadline=None)
@given(lengths_lists)
def test_best_fit_puts_everything_once_into_bins_that_hold_it_and_opens_none_too_early(lengths):
    bins = best_fit(lengths, BUDGET, MAX_SEQUENCES)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in members) for members in bins]
    assert all(0 < load <= BUDGET and len(members) <= MAX_SEQUENCES for load, members in zip(loads, bins, strict=True))
    for earlier in range(len(bins)):
        for later in range(earlier + 1, len(bins)):
            first = lengths[bins[later][0]]
            assert len(bins[earlier]) == MAX_SEQUENCES or loads[earlier] + first > BUDGET


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 28)), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_packed_fields_do_not_depend_on_the_order_of_the_samples(sizes, random):
    examples = [example(index, prompt, response) for index, (prompt, response) in enumerate(sizes)]
    batches = pack(examples, BUDGET, MAX_SEQUENCES)
    shuffled = random.sample(examples, len(examples))
    for batch, again in zip(batches, pack(shuffled, BUDGET, MAX_SEQUENCES), strict=True):
        assert torch.equal(batch.tokens, again.tokens)
        assert torch.equal(batch.cu_seqlens, again.cu_seqlens)
    seen = []
    for batch in batches:
        assert (len(batch.tokens), batch.max_sequences, batch.cu_seqlens.dtype) == (BUDGET, MAX_SEQUENCES, torch.int32)
        for index in range(MAX_SEQUENCES):
            start, end = batch.cu_seqlens[index : index + 2].tolist()
            if start == end:
                continue
            sample_id, prompt = int(batch.tokens[start]) // 1000, sizes[int(batch.tokens[start]) // 1000][0]
            seen.append(sample_id)
            expected = [sample_id * 1000 + position for position in range(sum(sizes[sample_id]))]
            assert batch.tokens[start:end].tolist() == expected
            assert batch.positions[start:end].tolist() == list(range(end - start))
            trained = [prompt - 1 <= position < end - start - 1 for position in range(end - start)]
            assert batch.mask[start:end].tolist() == trained
            assert (batch.seq_index[start:end] == index).all()
        predicted = batch.mask.nonzero().squeeze(1)
        assert torch.equal(batch.targets[predicted], batch.tokens[predicted + 1])
        assert torch.equal(batch.rollout_logprob[predicted], -batch.targets[predicted].float() / 100)
        assert torch.equal(batch.advantages[predicted], batch.tokens[predicted].div(1000, rounding_mode="floor") + 0.5)
        assert torch.equal(batch.temperature[predicted], torch.full_like(predicted, 0.7, dtype=torch.float32))
    assert sorted(seen) == list(range(len(sizes)))


def test_outside_the_trained_tokens_fields_hold_what_batch_py_promises():
    batch = fill([example(1, 2, 3)], 8, 2)
    assert batch.tokens.tolist() == [1000, 1001, 1002, 1003, 1004, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert batch.targets.tolist() == [IGNORE_INDEX, 1002, 1003, 1004, *[IGNORE_INDEX] * 4]
    assert batch.cu_seqlens.tolist() == [0, 5, 5]
    assert batch.seq_index.tolist() == [0, 0, 0, 0, 0, 2, 2, 2]
    outside = ~batch.mask
    assert batch.advantages[outside].count_nonzero() == batch.rollout_logprob[outside].count_nonzero() == 0
    assert (batch.temperature[outside] == 1).all()


def test_tool_results_are_read_but_not_trained_on():
    sample = Sample(3, (span([10, 11]), span([12, 13], trainable=False), span([14], temperature=0.0)), "stop", "")
    batch = fill([Example(torch.tensor([8, 9]), sample, 2.0)], 7, 1)
    assert batch.tokens.tolist() == [8, 9, 10, 11, 12, 13, 14]
    ignored = IGNORE_INDEX
    assert batch.targets.tolist() == [ignored, 10, 11, ignored, ignored, 14, ignored]
    assert batch.advantages.tolist() == [0, 2, 2, 0, 0, 2, 0]
    assert batch.temperature.tolist() == pytest.approx([1, 0.7, 0.7, 1, 1, 1, 1])  # greedy log-probs are of temperature 1


def test_without_padding_cuts_tokens_and_slots_and_copies_nothing():
    batch = fill([example(1, 2, 3), example(2, 1, 1)], 16, 4)
    cut = without_padding(batch)
    assert cut.tokens.tolist() == [1000, 1001, 1002, 1003, 1004, 2000, 2001]
    assert cut.cu_seqlens.tolist() == [0, 5, 7]
    assert cut.tokens.data_ptr() == batch.tokens.data_ptr()
    assert cut.old_logprob is None
    empty = without_padding(fill([], 16, 4))
    assert (len(empty.tokens), empty.cu_seqlens.tolist()) == (0, [0])


def test_a_sequence_longer_than_a_micro_batch_is_refused_with_its_length_and_the_flag():
    message = (
        r"--train.microbatch-tokens 40 is too small for 2 of 3 sequences, of 50, 41 tokens .*: raise it to 50 at least, "
        r"or lower --rollout.max-new-tokens"
    )
    with pytest.raises(InputError, match=message):
        pack([example(1, 20, 21), example(2, 20, 30), example(3, 1, 1)], BUDGET, MAX_SEQUENCES)


def test_truncated_sampling_is_refused_until_training_can_replay_it():
    sample = Sample(0, (span([1], keep_mask=torch.ones(1, 4, dtype=torch.bool)),), "stop", "")
    with pytest.raises(NotImplementedError, match="top-k / top-p / min-p"):
        pack([Example(torch.tensor([1]), sample, 1.0)], BUDGET, MAX_SEQUENCES)
