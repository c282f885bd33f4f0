"""The batches of an epoch, and when they are sent to the devices."""

import jax.numpy as jnp

from spinejax.training import epoch
from spinejax.training.epoch import Ahead, Feed
from spinejax.training.log import progress
from spinejax.training.train_step import TrainState


def recorded(num: int):
    """Batches that say when they are read, sent and closed; and the list of what happened."""
    happened: list[str] = []

    def read():
        try:
            for number in range(num):
                happened.append(f"read {number}")
                yield {"row": jnp.int32(number)}
        finally:
            happened.append("closed")

    def put(batch):
        happened.append(f"sent {batch['row']}")
        return batch

    return Ahead(read(), put), happened


def test_a_batch_is_sent_once_before_it_is_asked_for():
    batches, happened = recorded(3)
    batches.send()
    batches.send()
    assert happened == ["read 0", "sent 0"]
    assert next(batches)["row"] == 0
    assert happened == ["read 0", "sent 0"], "asking for a batch that was sent must not read another one"
    assert [int(next(batches)["row"]), int(next(batches)["row"])] == [1, 2]
    assert happened == [f"{what} {number}" for number in range(3) for what in ("read", "sent")]


def test_closing_ends_the_reading():
    batches, happened = recorded(3)
    batches.send()
    batches.close()
    assert happened == ["read 0", "sent 0", "closed"]


def test_an_epoch_ends_with_the_next_ones_first_batch_on_its_way():
    batches, happened = recorded(4)
    state = TrainState(step=jnp.int32(0), params={}, constants={}, momentum=(), plateau=(), skipped=jnp.int32(0))

    def step(state, batch):
        happened.append(f"step on {batch['row']}")
        return state.replace(step=state.step + 1), {"loss": jnp.float32(batch["row"])}

    with progress(2, 0, 1, show=False) as bar:
        state, taken = epoch.take_steps(state, Feed([], batches, list, ""), 2, step, lambda _: False, bar)
    assert happened[-3:] == ["step on 1", "read 2", "sent 2"]
    assert int(state.step) == 2
    assert [metrics["loss"] for metrics in taken.read()[0]] == [0, 1]
