"""Order of batches: a function of seed, epoch and rank; every image where it belongs."""

import itertools

import pytest

from vit_attn.data.samplers import EvalBatches, TrainBatches
from vit_attn.errors import UserError


def order(seed=0, epoch=0, **place):
    batches = TrainBatches(100, 8, seed=seed, **place)
    batches.set_epoch(epoch)
    return list(batches)


def test_order_depends_on_seed_and_epoch_alone():
    assert order(seed=3, epoch=2) == order(seed=3, epoch=2)
    distinct = {str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(distinct) == 9  # (0, 1) is not (1, 0) either


def test_every_image_at_most_once_and_batches_equal():
    batches = order()
    seen = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [8] * 12
    assert len(set(seen)) == len(seen) == 96
    assert seen != sorted(seen)


def test_ranks_partition_the_global_batch_of_one_process():
    alone = TrainBatches(100, 12, seed=1)
    ranks = [list(TrainBatches(100, 4, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*ranks, strict=True)] == list(alone)


def test_start_batch_skips_once_and_keeps_the_length():
    batches = TrainBatches(100, 8, seed=5)
    whole = list(batches)
    batches.start_batch = 5
    assert len(batches) == 12
    assert list(batches) == whole[5:]
    assert list(batches) == whole


def test_epoch_set_after_iter_still_counts():
    batches = TrainBatches(100, 8)
    late = iter(batches)  # Lightning makes the iterator before it calls set_epoch
    batches.set_epoch(4)
    assert list(late) == order(epoch=4)


def test_fewer_images_than_a_global_batch_make_one_batch():
    ranks = [list(TrainBatches(7, 128, rank=rank, world_size=2)) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [1, 1]
    assert [len(batches[0]) for batches in ranks] == [3, 3]
    assert not set(ranks[0][0]) & set(ranks[1][0])


@pytest.mark.parametrize("sampler", [TrainBatches, EvalBatches])
def test_fewer_images_than_ranks_is_refused(sampler):
    with pytest.raises(UserError, match=r"3 .* images cannot be shared by 4 processes"):
        sampler(3, 8, rank=0, world_size=4)


@pytest.mark.parametrize(("num_images", "world_size"), [(10, 1), (23, 3), (4, 4)])
def test_evaluation_covers_each_image_once(num_images, world_size):
    ranks = [EvalBatches(num_images, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [index for rank in ranks for batch in rank for index in batch]
    assert sorted(seen) == list(range(num_images))
    assert all(len(list(rank)) == len(rank) for rank in ranks)


def test_every_rank_evaluates_as_many_batches_and_none_is_empty():
    for num_images, batch_size, world_size in itertools.product(range(1, 40), range(1, 7), range(1, 6)):
        if num_images < world_size:
            continue
        place = {"world_size": world_size}
        ranks = [list(EvalBatches(num_images, batch_size, rank=rank, **place)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        sizes = [len(batch) for batches in ranks for batch in batches]
        assert min(sizes) >= 1
        assert max(sizes) <= max(2, batch_size)
        assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(num_images))


def test_one_process_evaluates_full_batches_and_a_rest():
    assert [len(batch) for batch in EvalBatches(11, 4)] == [4, 4, 3]
