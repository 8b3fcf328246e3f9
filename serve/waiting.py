"""Queue of waiting requests that serves its users in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class WaitingQueue(Generic[Item]):
    """First in, first out for each user, and one of each user in turn.

    A user with a hundred requests delays another user's single one by one request, not by a hundred.
    """

    def __init__(self) -> None:
        self._of_user: OrderedDict[bytes, deque[Item]] = OrderedDict()
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def push(self, user: bytes, item: Item) -> None:
        """Append an item of a user."""
        self._of_user.setdefault(user, deque()).append(item)
        self._n += 1

    def pop(self) -> Item:
        """Remove and return the next item.

        Raises:
            IndexError: there is none.
        """
        if not self._n:
            raise IndexError("the queue is empty")
        user, items = self._of_user.popitem(last=False)
        item = items.popleft()
        self._n -= 1
        # The user's next item comes after one of each other user.
        if items:
            self._of_user[user] = items
        return item

    def remove(self, user: bytes, item: Item) -> bool:
        """Remove an item of a user. Return whether it was there."""
        items = self._of_user.get(user)
        if items is None or item not in items:
            return False
        items.remove(item)
        self._n -= 1
        if not items:
            del self._of_user[user]
        return True

    def clear(self) -> list[Item]:
        """Remove and return all items."""
        items = [self.pop() for _ in range(self._n)]
        return items
