from typing import overload

# One dict for both ways: 7 to "unreachable", "unreachable" to 7.
class _Names:
    @overload
    def get(self, key: int, default: str) -> str: ...
    @overload
    def get(self, key: str, default: int) -> int: ...
    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: str) -> int: ...

rt_type: _Names
