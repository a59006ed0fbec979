import random
from dataclasses import replace

import pytest
import torch

from rlhf.data.collate import (
    add_mismatched_responses,
    collate,
    collate_comparisons,
    collate_labels,
    collate_prompts,
    pack,
)
from rlhf.data.encoded_rows import Encoded, EncodedComparison, EncodedLabel
from rlhf.data.record_conversion import comparison_labels
from rlhf.data.records import Comparison, Message
from rlhf.errors import UserError

PAD = 0


def row(*ids, targets=None):
    return Encoded(list(ids), [True] * len(ids) if targets is None else [i in targets for i in range(len(ids))])


@pytest.mark.parametrize("side", ["right", "left"])
def test_masks_come_from_positions_not_from_the_pad_id(side):
    batch = collate([row(0, 0, 5), row(7, 0, 0, 0, 9)], PAD, side)
    assert batch.ids.shape == (2, 5)
    assert batch.attention_mask.sum(1).tolist() == [3, 5]
    first = batch.attention_mask[0]
    assert batch.ids[0][first].tolist() == [0, 0, 5]
    assert batch.position_ids[0][first].tolist() == [0, 1, 2]
    assert first.tolist() == ([True] * 3 + [False] * 2 if side == "right" else [False] * 2 + [True] * 3)
    assert batch.loss_mask[0][first].tolist() == [False, True, True]  # a first token has no predecessor
    assert not batch.loss_mask[~batch.attention_mask].any()


def test_prompts_end_at_the_right_edge():
    batch = collate_prompts([[1], [2, 3, 4]], PAD)
    assert batch.ids.tolist() == [[0, 0, 1], [2, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert not batch.loss_mask.any()


def test_pairs_share_rows_and_have_total_weight_one_per_prompt():
    ranking = EncodedComparison(
        [1, 2], [[3, 9], [4, 4, 9], [5, 9]], [(0, 1, "better"), (0, 2, None), (1, 2, "slightly")]
    )
    pair = EncodedComparison([6], [[7, 9], [8, 9]], [(0, 1, "significantly")])
    batch = collate_comparisons([ranking, pair], PAD)
    assert len(batch.tokens) == 5 and len(batch) == 4
    assert batch.chosen.tolist() == [0, 0, 1, 3] and batch.rejected.tolist() == [1, 2, 2, 4]
    assert batch.grade.tolist() == [2, -1, 1, 3]
    assert batch.weight.tolist() == pytest.approx([1 / 3] * 3 + [1.0])
    same = batch.prompt_index[:, None] == batch.prompt_index
    assert same.tolist() == [[True] * 3 + [False]] * 3 + [[False] * 3 + [True]]
    assert batch.scores is None
    assert batch.tokens.ids[1].tolist() == [1, 2, 4, 4, 9]
    assert batch.tokens.loss_mask[1].tolist() == [False, False, True, True, True]


def test_prompts_are_numbered_by_their_tokens():
    """Two records of one prompt have the same number, in one batch or in two; the number is never negative."""
    records = [EncodedComparison([1, 2], [[3, 9], [4, 9]], [(0, 1, None)]) for _ in range(2)]
    records[1] = replace(records[1], responses=[[5, 9], [3, 9]])
    other = EncodedComparison([1, 2, 3], [[9], [4, 9]], [(0, 1, None)])  # 1 2 | 3 9 and 1 2 3 | 9 are two prompts
    together = collate_comparisons([*records, other], PAD).prompt_index.tolist()
    assert together[0] == together[1] != together[2] and min(together) >= 0
    assert [collate_comparisons([record], PAD).prompt_index.item() for record in (*records, other)] == together


def test_rows_in_no_pair_are_left_out_and_scores_follow_their_rows():
    item = EncodedComparison([1], [[2], [3], [4]], [(0, 2, None)], scores=(1.0, 0.5, 0.25))
    batch = collate_comparisons([item], PAD)
    assert batch.tokens.ids.tolist() == [[1, 2], [1, 4]]
    assert batch.scores.tolist() == [1.0, 0.25]
    with pytest.raises(UserError, match="all comparisons of a batch are ties"):
        collate_comparisons([EncodedComparison([1], [[2], [2]], [])], PAD)


def test_labels_are_paired_with_the_response_to_another_prompt():
    """Rows 0 and 1 respond to one prompt (as two labels of a comparison do), so both take row 2's response."""
    rows = [EncodedLabel([1], [2, 9], True), EncodedLabel([1], [6, 9], False), EncodedLabel([3], [4, 5, 9], False)]
    done = add_mismatched_responses(rows, longest=16)
    batch = collate_labels(done, PAD)
    assert batch.tokens.ids.tolist() == [[1, 2, 9, 0], [1, 6, 9, 0], [3, 4, 5, 9]]
    assert batch.mismatched.ids.tolist()[:2] == [[1, 4, 5, 9], [1, 4, 5, 9]]
    assert batch.mismatched.ids.tolist()[2] in ([3, 2, 9, 0], [3, 6, 9, 0])
    assert batch.desirable.tolist() == [True, False, False]
    # cutting the batch does not change the mismatched pairs
    assert collate_labels(done[2:], PAD).mismatched.ids.tolist() == [batch.mismatched.ids.tolist()[2][:3]]
    short = [row.mismatched for row in add_mismatched_responses(rows, longest=3)]
    assert short[:2] == [None, None] and short[2] in ([2, 9], [6, 9])
    assert collate_labels(add_mismatched_responses(rows[:2], longest=16), PAD).mismatched is None


@pytest.mark.parametrize("grades, share", [((), 1 / 2), (("tie", None, None), 2 / 3)])
def test_mismatched_responses_have_the_same_share_of_good_ones(grades, share):
    """z is an expectation over all responses (2402.01306), and comparisons list their responses best first."""
    rows = []
    for asked in range(300):
        responses = ("a", "b", "c") if grades else ("a", "b")
        for label in comparison_labels(Comparison((Message("user", f"question {asked}"),), responses, grades=grades)):
            rows.append(EncodedLabel([asked], [int(label.desirable), len(rows)], label.desirable))
    done = add_mismatched_responses(rows, longest=8)
    good = [row.mismatched[0] for row in done]
    assert sum(row.desirable for row in rows) / len(rows) == pytest.approx(share)
    error = (share * (1 - share) / len(rows)) ** 0.5
    assert abs(sum(good) / len(rows) - share) < 3 * error
    assert all(rows[row.mismatched[1]].prompt != row.prompt for row in done)
    # Good and bad responses are paired with the same mixture.
    own = [g for g, row in zip(good, done, strict=True) if row.desirable]
    assert abs(sum(own) / len(own) - share) < 3 * error * (len(rows) / len(own)) ** 0.5


def test_mismatched_responses_are_the_same_on_every_rank_and_after_a_resume():
    """They depend on (seed, row) alone: not on Python's hashes, which differ by process, nor on earlier draws."""
    rows = [EncodedLabel([asked], [asked], True) for asked in range(100)]
    drawn = [row.mismatched[0] for row in add_mismatched_responses(rows, longest=8)]
    random.seed(1)
    assert [row.mismatched[0] for row in add_mismatched_responses(rows, longest=8)] == drawn
    assert drawn[:5] == [9, 32, 53, 17, 24]  # as first drawn; Random is seeded with a text by its SHA-512
    assert [row.mismatched[0] for row in add_mismatched_responses(rows, longest=8, seed=1)] != drawn
    assert len(set(drawn)) > 50  # not one response for all: 63 different ones are expected of 100 draws


def test_packing_keeps_every_token_and_restarts_positions():
    documents = [row(1, 2, 3), row(4, 5), row(6, 7, 8), row(*range(10, 21))]
    rows = pack(documents, 5)
    # The windows of a longer document share a token, so that each of 11 to 20 is a target once.
    windows = [[10, 11, 12, 13, 14], [14, 15, 16, 17, 18], [18, 19, 20]]
    assert [item.ids for item in rows] == [[1, 2, 3, 4, 5], [6, 7, 8], *windows]
    targets = [token for item in rows[2:] for token, counts in zip(item.ids, item.mask, strict=True) if counts]
    assert targets == list(range(11, 21))
    assert rows[0].positions == [0, 1, 2, 0, 1]
    assert rows[0].mask == [False, True, True, False, True]  # no document predicts the first token of the next
    batch = collate(rows, PAD)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1]
    assert batch.loss_mask[0].tolist() == [False, True, True, False, True]


def test_batches_move_to_a_device_as_a_whole():
    batch = collate_comparisons([EncodedComparison([1], [[2], [3]], [(0, 1, None)])], PAD).to(torch.device("meta"))
    assert batch.chosen.device.type == batch.tokens.ids.device.type == "meta" and batch.scores is None
