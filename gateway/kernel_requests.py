"""KernelRequests: what was asked of a kernel and is not over, so that a death or a restart leaves nobody waiting."""

from __future__ import annotations

from dataclasses import dataclass

#: What is remembered of one kernel at most; past it the oldest that do not run are forgotten.
MAX_REQUESTS = 2000
MAX_HEADERS_BYTES = 4 * 1024 * 1024
_NO_HEADER = b"{}"


@dataclass
class KernelRequest:
    """One request. `header` is its header as it came, `tag` the route of its reply (None: not asked by a client)."""

    msg_id: str
    msg_type: str
    header: bytes
    tag: bytes | None = None
    channel: str = "shell"
    #: the kernel has said that it is busy with it, has answered it, and is idle again
    begun: bool = False
    replied: bool = False
    idle: bool = False
    execution_count: int | None = None
    #: an earlier gateway sent it, and its reply goes to that one; whether it raised
    orphaned: bool = False
    #: it ran already when no gateway listened
    missed: bool = False
    failed: bool = False

    @property
    def is_over(self) -> bool:
        """Whether its client has its answer, as far as anybody here can tell."""
        return self.replied and self.tag is not None


class KernelRequests:
    """The requests that are not over, oldest first. Pure: told by whoever sees the messages."""

    def __init__(self) -> None:
        self._requests: dict[str, KernelRequest] = {}
        self._bytes = 0

    @property
    def running(self) -> list[KernelRequest]:
        """What the kernel is busy with."""
        return [request for request in self._requests.values() if request.begun and not request.idle]

    @property
    def waiting(self) -> list[KernelRequest]:
        """What it has not begun, or not answered although it is idle again."""
        return [request for request in self._requests.values() if not request.begun or request.idle]

    @property
    def busy(self) -> bool:
        """Whether the kernel works on something."""
        return any(request.begun and not request.idle for request in self._requests.values())

    @property
    def answering(self) -> bool:
        """Whether a reply is on its way: the kernel is idle again, which comes by another socket."""
        return any(request.begun and request.idle and not request.replied for request in self._requests.values())

    def find(self, msg_id: str) -> KernelRequest | None:
        """The request of that id, unless it is over."""
        return self._requests.get(msg_id)

    def sent(self, msg_id: str, msg_type: str, header: bytes, tag: bytes, channel: str) -> None:
        """A client has sent a request."""
        self._add(KernelRequest(msg_id, msg_type, header, tag, channel))

    def adopt(self, msg_id: str) -> KernelRequest:
        """The kernel runs a cell that an earlier gateway has sent; its header comes with its next message."""
        request = KernelRequest(
            msg_id, "execute_request", _NO_HEADER, begun=True, replied=True, orphaned=True, missed=True
        )
        self._add(request)
        return request

    def name(self, request: KernelRequest, header: bytes) -> None:
        """The kernel has said what the header of an adopted cell is."""
        if request.header == _NO_HEADER:
            self._bytes += len(header) - len(request.header)
            request.header = header

    def began(self, msg_id: str, msg_type: str, header: bytes, *, orphaned: bool = False) -> KernelRequest:
        """The kernel is busy with a request. `orphaned`: if nobody here has sent it, an earlier gateway did."""
        request = self._requests.get(msg_id)
        if request is None:
            # Its reply goes to somebody else.
            request = KernelRequest(msg_id, msg_type, header, replied=True, orphaned=orphaned)
            self._add(request)
        request.begun = True
        return request

    def ended(self, msg_id: str) -> None:
        """The kernel is idle again after a request."""
        request = self._requests.get(msg_id)
        if request is not None:
            request.idle = True
            self._forget_if_over(request)

    def replied(self, msg_id: str) -> None:
        """The kernel has answered a request."""
        request = self._requests.get(msg_id)
        if request is not None:
            request.replied = True
            self._forget_if_over(request)

    def clear(self) -> None:
        """Forget all."""
        self._requests.clear()
        self._bytes = 0

    def _add(self, request: KernelRequest) -> None:
        self._forget(request.msg_id)
        self._requests[request.msg_id] = request
        self._bytes += len(request.header)
        while len(self._requests) > MAX_REQUESTS or self._bytes > MAX_HEADERS_BYTES:
            # What runs goes last: who sends more than fits sends it behind a cell that takes long.
            others = (each for each in self._requests.values() if each is not request and (not each.begun or each.idle))
            self._forget(next(others, next(iter(self._requests.values()))).msg_id)

    def _forget_if_over(self, request: KernelRequest) -> None:
        # Some kernels publish no status for requests on control: a reply without a busy status is all there is.
        if request.replied and (request.idle or not request.begun):
            self._forget(request.msg_id)

    def _forget(self, msg_id: str) -> None:
        request = self._requests.pop(msg_id, None)
        if request is not None:
            self._bytes -= len(request.header)
