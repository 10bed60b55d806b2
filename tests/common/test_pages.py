"""Pages against a brute-force model: sets and lists that are searched, where the allocator counts."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from common.pages import DistKVCache, OutOfPages, PageAllocator, PageError, pages_for


class PagesMachine(RuleBasedStateMachine):
    """Requests that grow and go; the model keeps the length of each and recounts the pages from scratch."""

    caches = Bundle("caches")

    @initialize(capacity=st.integers(1, 12), page_size=st.integers(1, 5))
    def begin(self, capacity, page_size):
        self.pool = PageAllocator(capacity, page_size)
        self.lengths: dict[DistKVCache, int] = {}

    def used(self):
        return sum(-(-n // self.pool.page_size) for n in self.lengths.values())

    @rule(target=caches)
    def new(self):
        cache = DistKVCache(self.pool)
        self.lengths[cache] = 0
        return cache

    @rule(cache=caches, tokens=st.integers(0, 20))
    def extend(self, cache, tokens):
        before = list(cache.indices)
        self.lengths[cache] += tokens
        if self.used() <= self.pool.capacity:
            cache.allocate_tokens(tokens)
            assert cache.indices[: len(before)] == before
        else:
            needed = self.used()
            self.lengths[cache] -= tokens
            needed -= self.used()
            with pytest.raises(OutOfPages) as error:
                cache.allocate_tokens(tokens)
            assert (error.value.requested, error.value.free, error.value.total) == (
                needed,
                self.pool.capacity - self.used(),
                self.pool.capacity,
            )
            assert cache.indices == before

    @rule(cache=consumes(caches))
    def release(self, cache):
        pages = list(cache.indices)
        cache.release()
        del self.lengths[cache]
        with pytest.raises(PageError, match=f"{pages[0]}" if pages else "twice"):
            cache.release()
        with pytest.raises(PageError):
            cache.allocate_tokens(1)
        for page in pages:
            with pytest.raises(PageError, match=f"page {page} "):
                self.pool.free_page(page)

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "pool"):
            return
        pages = [page for cache in self.lengths for page in cache.indices]
        assert len(pages) == len(set(pages)) == self.used()
        assert all(0 <= page < self.pool.capacity for page in pages)
        assert self.pool.num_free_pages == self.pool.capacity - len(pages)
        for cache, length in self.lengths.items():
            assert cache.seqlen == length
            full = (len(cache.indices) - 1) * self.pool.page_size
            assert length == (full + cache.last_page_offset if length else 0)
            assert not length or 1 <= cache.last_page_offset <= self.pool.page_size


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_out_of_pages_has_the_three_counts():
    pool = PageAllocator(3, 4)
    first, second = DistKVCache(pool), DistKVCache(pool)
    first.allocate_tokens(5)
    with pytest.raises(OutOfPages, match="3 pages requested, 1 of 3 free") as error:
        second.allocate_tokens(9)
    assert (error.value.requested, error.value.free, error.value.total) == (3, 1, 3)
    assert second.seqlen == 0 and second.indices == [] and pool.num_free_pages == 1
    second.allocate_tokens(4)
    with pytest.raises(OutOfPages):
        pool.alloc_page()


@pytest.mark.parametrize("page", [-1, 3, 10**9])
def test_foreign_page_is_named(page):
    with pytest.raises(PageError, match=f"page {page} is not one"):
        PageAllocator(3, 4).free_page(page)


def test_page_never_taken_cannot_be_freed():
    with pytest.raises(PageError, match="page 2 is free already"):
        PageAllocator(3, 4).free_page(2)


def test_negative_tokens():
    with pytest.raises(ValueError, match="-1"):
        DistKVCache(PageAllocator(3, 4)).allocate_tokens(-1)


@pytest.mark.parametrize("capacity, page_size", [(0, 1), (1, 0), (-3, 4)])
def test_impossible_pools(capacity, page_size):
    with pytest.raises(ValueError):
        PageAllocator(capacity, page_size)


def test_pages_for_is_the_ceiling():
    assert [pages_for(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_ten_thousand_random_operations_leave_nothing_behind():
    draw = random.Random(1)
    pool = PageAllocator(64, 7)
    live: list[DistKVCache] = []
    for _ in range(10_000):
        if live and draw.random() < 0.4:
            live.pop(draw.randrange(len(live))).release()
            continue
        if not live or draw.random() < 0.5:
            live.append(DistKVCache(pool))
        try:
            draw.choice(live).allocate_tokens(draw.randint(0, 60))
        except OutOfPages as error:
            assert error.requested > error.free == pool.num_free_pages
        pages = [page for cache in live for page in cache.indices]
        assert len(set(pages)) == len(pages) == pool.capacity - pool.num_free_pages
    for cache in live:
        cache.release()
    assert pool.num_free_pages == 64
