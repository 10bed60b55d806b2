"""Which page of KV memory belongs to whom: counting, no tensors and no torch.

A pool of `capacity` pages holds `page_size` tokens a page. A request owns a list of pages, in the order of its tokens;
only the last one may be partly filled. That list is all a paged attention kernel needs to find the keys and values
(Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention").
The tensors live in `common.kv_cache.DistKVPool`, which is a PageAllocator with storage.
"""

from common.errors import UserError


class OutOfPages(Exception):
    """More pages were asked for than are free. Nothing was allocated."""

    def __init__(self, requested: int, free: int, total: int):
        super().__init__(f"{requested} pages requested, {free} of {total} free")
        self.requested = requested
        self.free = free
        self.total = total


class PageError(RuntimeError):
    """A page was given back twice, was never the pool's, or is used after it was given back: a bug in the caller."""


def check_page_size(page_size: int) -> None:
    """UserError for a page size that no engine takes."""
    if not 1 <= page_size <= 256:
        raise UserError(f"--page-size {page_size}: use 1 to 256 tokens a page")


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens: the ceiling of their quotient."""
    return -(-num_tokens // page_size)


class PageAllocator:
    """Hands out page numbers 0 .. capacity - 1; O(1) for each page taken or given back.

    The free list is a stack: the page given back last, whose lines are likeliest to be in cache, goes out first.
    """

    def __init__(self, capacity: int, page_size: int):
        if capacity < 1 or page_size < 1:
            raise ValueError(f"capacity and page_size must be at least 1, not {capacity} and {page_size}")
        self.capacity = capacity
        self.page_size = page_size
        self._free = list(range(capacity - 1, -1, -1))
        self._taken = bytearray(capacity)

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def alloc_page(self) -> int:
        """Take one page. Raises OutOfPages when none is free."""
        if not self._free:
            raise OutOfPages(1, 0, self.capacity)
        page = self._free.pop()
        self._taken[page] = 1
        return page

    def free_page(self, page: int) -> None:
        """Give one page back. Raises PageError for a page that is not the pool's, or is free already."""
        if not 0 <= page < self.capacity:
            raise PageError(f"page {page} is not one of this pool's {self.capacity} pages")
        if not self._taken[page]:
            raise PageError(f"page {page} is free already: it was given back twice")
        self._taken[page] = 0
        self._free.append(page)


class DistKVCache:
    """One request's pages, in the order of its tokens.

    `seqlen`: tokens that have their place. `indices`: the page numbers. `room`: tokens that its last page still takes.
    `last_page_offset`: tokens in the last page, from 1 to page_size (0 while there is none): FlashInfer's
    `kv_last_page_len`.
    """

    __slots__ = ("pool", "seqlen", "indices", "room", "_released")

    def __init__(self, pool: PageAllocator):
        self.pool = pool
        self.seqlen = 0
        self.indices: list[int] = []
        self.room = 0
        self._released: list[int] | None = None

    @property
    def last_page_offset(self) -> int:
        return (self.seqlen - 1) % self.pool.page_size + 1 if self.seqlen else 0

    def pages_needed(self, num_tokens: int) -> int:
        """New pages that `num_tokens` more tokens take."""
        return max(0, pages_for(num_tokens - self.room, self.pool.page_size))

    def allocate_tokens(self, num_tokens: int) -> None:
        """Make room for `num_tokens` more tokens: all of them, or none and OutOfPages(requested, free, total)."""
        if 0 < num_tokens <= self.room:  # nearly every decode
            self.seqlen += num_tokens
            self.room -= num_tokens
            return
        if self._released is not None:
            raise PageError(f"tokens added to a request after its pages {self._released} were released")
        if num_tokens < 0:
            raise ValueError(f"cannot allocate {num_tokens} tokens")
        needed = self.pages_needed(num_tokens)
        if needed > self.pool.num_free_pages:
            raise OutOfPages(needed, self.pool.num_free_pages, self.pool.capacity)
        for _ in range(needed):
            self.indices.append(self.pool.alloc_page())
        self.seqlen += num_tokens
        self.room += needed * self.pool.page_size - num_tokens

    def release(self) -> None:
        """Give all pages back. A second release is a PageError that names them."""
        if self._released is not None:
            raise PageError(f"pages {self._released} released twice")
        for page in self.indices:
            self.pool.free_page(page)
        self._released = self.indices
        self.indices = []
        self.seqlen = self.room = 0
