"""The index arrays of a step, against loops over single tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kv_cache import DistKVPool
from common.paged.batch import DeviceBatch, HostBatch, Upload, build_kv_metadata, kv_metadata
from common.pages import PageAllocator
from common.serving import Chunk, InputRequest, Request, reserve_pages


def make_request(prompt_len, number=0, output_len=10):
    ids = [100 * number + i for i in range(prompt_len)]
    return Request(InputRequest(prompt_token_ids=ids, output_len=output_len), number)


def test_a_step_written_out():
    """Two decodes, a whole prompt, and the middle of another."""
    a, b, c, d = (make_request(n, i) for i, n in enumerate((3, 2, 4, 9)))
    chunks = [Chunk(a, 5, 1), Chunk(b, 2, 1), Chunk(c, 0, 4), Chunk(d, 2, 3)]
    host = HostBatch.of(chunks, [7, 0, 2, 5])
    assert host.num_decodes == 2 and host.num_tokens == 9 and not host.all_sample
    assert host.positions.tolist() == [5, 2, 0, 1, 2, 3, 2, 3, 4]
    assert host.token_slots.tolist() == [7, 0, 2, 2, 2, 2, 5, 5, 5]
    assert host.prompt_tokens.tolist() == [200, 201, 202, 203, 302, 303, 304]
    assert host.kv_lens.tolist() == [6, 3, 4, 5]
    assert host.sampled_rows.tolist() == [0, 1, 2]  # d's prompt is not all read
    assert host.last_tokens.tolist() == [0, 1, 5]
    batch, (more,) = DeviceBatch.of(host, Upload(torch.device("cpu")), [np.array([4, 2])])
    assert batch.q_indptr.tolist() == [0, 1, 2, 6, 9] and more.tolist() == [4, 2]
    assert all(t.dtype == torch.int32 for t in vars(batch).values())


def test_the_last_piece_of_a_prompt_samples():
    d = make_request(9)
    assert HostBatch.of([Chunk(d, 5, 3)], [0]).sampled_rows.tolist() == []
    host = HostBatch.of([Chunk(d, 5, 4)], [0])
    assert host.sampled_rows.tolist() == [0] and host.last_tokens.tolist() == [3] and host.num_decodes == 0
    assert host.all_sample


def test_after_a_preemption_known_output_tokens_are_prompt_tokens():
    a = make_request(3)
    a.read(50, 0.0)
    a.read(51, 0.0)
    a.preempt()
    host = HostBatch.of([Chunk(a, 0, 5)], [0])
    assert host.num_decodes == 0 and host.prompt_tokens.tolist() == [0, 1, 2, 50, 51]


def test_a_decode_behind_a_piece_is_refused():
    a, b = make_request(3), make_request(4, 1)
    with pytest.raises(ValueError, match="decodes come first"):
        HostBatch.of([Chunk(b, 0, 4), Chunk(a, 3, 1)], [0, 1])


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), page_size=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_kv_metadata_lists_every_slot_once(lengths, page_size, seed):
    """Walking the arrays as FlashInfer defines them gives each request its own tokens' slots, in order."""
    pool = PageAllocator(400, page_size)
    requests = [make_request(n, i) for i, n in enumerate(lengths)]
    order = np.random.default_rng(seed).permutation(np.repeat(range(len(lengths)), lengths))
    expected = [[] for _ in requests]  # (page, offset) of each token, noted as it is given
    for i in order:  # one token at a time, so that pages of different requests mix
        reserve_pages(pool, [Chunk(requests[i], requests[i].num_computed, 1)])
        expected[i].append((requests[i].pages.indices[-1], requests[i].pages.last_page_offset - 1))
    m = build_kv_metadata(requests)
    assert all(t.dtype == torch.int32 and t.device.type == "cpu" for t in m.values())
    assert m["qo_indptr"].tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for i, slots in enumerate(expected):
        pages = m["kv_indices"][m["kv_indptr"][i] : m["kv_indptr"][i + 1]].tolist()
        last = int(m["kv_last_page_len"][i])
        walked = [(page, o) for j, page in enumerate(pages) for o in range(page_size if j < len(pages) - 1 else last)]
        assert walked == slots
    queries = [1] * len(lengths)
    assert build_kv_metadata(requests, queries)["qo_indptr"].tolist() == list(range(len(lengths) + 1))


def test_kv_metadata_of_no_rows_and_of_pages_beyond_the_length():
    m = kv_metadata([], [], [], 4)
    assert [m[name].tolist() for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")] == [
        [0], [0], [], [],
    ]  # fmt: skip
    m = kv_metadata([[5, 6, 7], [9]], [4, 3], [1, 3], 4)  # the first has pages taken ahead
    assert m["kv_indices"].tolist() == [5, 9] and m["kv_last_page_len"].tolist() == [4, 3]


def test_build_kv_metadata_uses_the_pool_s_device():
    pool = DistKVPool(1, 1, 2, 4, 2, torch.float32, "cpu")
    request = make_request(3)
    reserve_pages(pool, [Chunk(request, 0, 3)])
    m = build_kv_metadata([request])
    assert m["kv_indices"].tolist() == request.pages.indices and m["kv_last_page_len"].tolist() == [1]
    assert build_kv_metadata([request], device="meta")["kv_indices"].device.type == "meta"
