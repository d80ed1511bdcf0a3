#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Print ublk_loop/_uring.pyi, the types of the compiled module, as csrc/ul.h has them.

In: the boundary header, parsed by pycparser (which cffi brings along). Out: the stub, on stdout.
The header is the only source: ``tools/uring_stub.py > ublk_loop/_uring.pyi`` after each change to
it; a unit test fails until that is done.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pycparser import c_ast, c_parser

HEADER = Path(__file__).resolve().parent.parent / "ublk_loop" / "csrc" / "ul.h"

SIGNED = ["int8_t", "int16_t", "int32_t", "int64_t", "ssize_t", "intptr_t"]
UNSIGNED = ["uint8_t", "uint16_t", "uint32_t", "uint64_t", "size_t", "uintptr_t"]
TYPEDEFS = " ".join(f"typedef long {name};" for name in SIGNED + UNSIGNED)
INTEGERS = {*SIGNED, *UNSIGNED, "int", "long", "short", "unsigned", "signed"}
BYTES = {"char", "uint8_t"}  # a pointer to one of these also takes a bytes object

PROLOGUE = '''\
"""Types of the compiled module. Written by tools/uring_stub.py from csrc/ul.h: do not edit.

A pointer to a struct and the struct itself are one class: cffi reads fields through both. The
classes exist here only; import them under ``if TYPE_CHECKING``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeAlias, TypeVar, final, overload

from typing_extensions import Buffer

class CData:
    def __bool__(self) -> bool: ...
    def __hash__(self) -> int: ...
    def __int__(self) -> int: ...

_T = TypeVar("_T")
_CDataT = TypeVar("_CDataT", bound=CData)

@final
class Array(CData, Generic[_T]):
    @overload
    def __getitem__(self, index: int, /) -> _T: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array[_T]: ...
    @overload
    def __setitem__(self, index: int, value: _T, /) -> None: ...
    @overload
    def __setitem__(self, index: slice, value: Buffer | Sequence[_T], /) -> None: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_T]: ...

@final
class CBuffer:
    @overload
    def __getitem__(self, index: int, /) -> bytes: ...
    @overload
    def __getitem__(self, index: slice, /) -> bytes: ...
    def __setitem__(self, index: int | slice, value: Buffer, /) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

Fields: TypeAlias = Mapping[str, object] | Sequence[object]
_Integer: TypeAlias = Literal[
    {integer_pointers},
]
_Integers: TypeAlias = Literal[
    {integer_arrays},
]
'''

FFI_COMMON = """\
    @overload
    def new(self, cdecl: _Integer, init: int = ...) -> Array[int]: ...
    @overload
    def new(self, cdecl: _Integers, init: int | Sequence[int] | bytes) -> Array[int]: ...
    @overload
    def new(self, cdecl: str, init: object = ...) -> CData: ...
    @overload
    def from_buffer(self, buffer: Buffer, /) -> Array[int]: ...
    @overload
    def from_buffer(
        self, cdecl: _Integers, buffer: Buffer, require_writable: bool = ...
    ) -> Array[int]: ...
    @overload
    def from_buffer(self, cdecl: str, buffer: Buffer, require_writable: bool = ...) -> CData: ...
    def buffer(self, cdata: CData, size: int = ...) -> CBuffer: ...
    def gc(self, cdata: _CDataT, destructor: Callable[[_CDataT], None] | None) -> _CDataT: ...
    def cast(self, cdecl: str, source: CData | int) -> CData: ...
    def release(self, cdata: CData) -> None: ...
    def memmove(self, dest: CData | Buffer, src: CData | Buffer, n: int) -> None: ...
    def sizeof(self, cdecl: str | CData) -> int: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def unpack(self, cdata: CData, length: int) -> bytes: ...
"""


def python_type(node: c_ast.Node) -> str:
    """Return the stub's name for a C type; a pointer to a struct is named like the struct."""
    if isinstance(node, c_ast.TypeDecl):
        return _base_type(node.type)
    if isinstance(node, (c_ast.PtrDecl, c_ast.ArrayDecl)):
        if isinstance(node.type, c_ast.FuncDecl):
            return "CData"
        inner = python_type(node.type)
        is_pointer_to_struct = isinstance(node, c_ast.PtrDecl) and _is_struct(node.type)
        if inner == "None":
            return "CData"
        return inner if is_pointer_to_struct else f"Array[{inner}]"
    raise SystemExit(f"uring_stub: no Python type for {type(node).__name__}")


def _is_struct(node: c_ast.Node) -> bool:
    return isinstance(node, c_ast.TypeDecl) and isinstance(node.type, c_ast.Struct)


def _base_type(node: c_ast.Node) -> str:
    if isinstance(node, c_ast.Struct):
        return str(node.name)
    if isinstance(node, c_ast.Enum):
        return "int"
    names = set(node.names)
    if names == {"void"}:
        return "None"
    if names == {"_Bool"}:
        return "bool"
    if names == {"char"}:
        return "bytes"
    if names <= INTEGERS | {"char"}:
        return "int"
    raise SystemExit(f"uring_stub: no Python type for {' '.join(node.names)}")


def parameter_type(node: c_ast.Node) -> str:
    """Return what a caller may pass: bytes too where cffi takes them for a pointer."""
    if isinstance(node, c_ast.PtrDecl) and isinstance(node.type, c_ast.TypeDecl):
        pointee = node.type
        if isinstance(pointee.type, c_ast.IdentifierType):
            name = pointee.type.names[-1]
            if name == "char" or (name in {"void", *BYTES} and "const" in pointee.quals):
                return "CData | bytes"
    return python_type(node)


def function_lines(declaration: c_ast.Decl) -> Iterator[str]:
    """Yield the method of Lib that stands for one C function."""
    parameters = declaration.type.args.params if declaration.type.args else []
    pairs = [
        f"{parameter.name}: {parameter_type(parameter.type)}"
        for parameter in parameters
        if python_type(parameter.type) != "None"
    ]
    arguments = ["self", *pairs, *(["/"] if pairs else [])]
    result = python_type(declaration.type.type)
    line = f"    def {declaration.name}({', '.join(arguments)}) -> {result}: ..."
    if len(line) <= 100:
        yield line
    else:
        yield f"    def {declaration.name}("
        yield f"        {', '.join(arguments)}" + ("," if not pairs else "")
        yield f"    ) -> {result}: ..."


def field_lines(field: c_ast.Decl) -> Iterator[str]:
    """Yield a struct's field; an array reads as an Array and is set from Python's own types."""
    type_name = python_type(field.type)
    if not isinstance(field.type, c_ast.ArrayDecl):
        yield f"    {field.name}: {type_name}"
        return
    item = type_name.removeprefix("Array[").removesuffix("]")
    yield "    @property"
    yield f"    def {field.name}(self) -> {type_name}: ..."
    yield f"    @{field.name}.setter"
    source = "bytes" if item == "bytes" else f"Sequence[{item}]"
    yield f"    def {field.name}(self, value: {source}) -> None: ..."


def struct_lines(struct: c_ast.Struct) -> Iterator[str]:
    """Yield the class that stands for a struct and for a pointer to it."""
    yield "@final"
    if not struct.decls:
        yield f"class {struct.name}(CData): ..."
    else:
        yield f"class {struct.name}(CData):"
        for field in struct.decls:
            yield from field_lines(field)
    yield ""


def new_lines(struct: c_ast.Struct) -> Iterator[str]:
    """Yield the overloads of ffi.new() for a struct: itself, an array, an out parameter."""
    name = struct.name
    signatures = (
        [
            f'cdecl: Literal["struct {name} *"], init: Fields = ...) -> {name}',
            f'cdecl: Literal["struct {name}[]"], init: int) -> Array[{name}]',
        ]
        if struct.decls
        else [f'cdecl: Literal["struct {name} **"]) -> Array[{name}]']
    )
    for signature in signatures:
        yield "    @overload"
        yield f"    def new(self, {signature}: ..."


def stub(header: str) -> str:
    """Return the text of _uring.pyi for the text of ul.h."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", header, flags=re.DOTALL)
    tree = c_parser.CParser().parse(TYPEDEFS + text)
    structs: dict[str, c_ast.Struct] = {}
    functions: list[c_ast.Decl] = []
    constants: list[str] = []
    for declaration in tree.ext:
        if isinstance(declaration, c_ast.Typedef):
            continue
        if isinstance(declaration.type, c_ast.Struct):
            if declaration.type.decls or declaration.type.name not in structs:
                structs[declaration.type.name] = declaration.type
        elif isinstance(declaration.type, c_ast.Enum):
            constants += [item.name for item in declaration.type.values.enumerators]
        elif isinstance(declaration.type, c_ast.FuncDecl):
            functions.append(declaration)
        else:
            raise SystemExit(f"uring_stub: cannot type {declaration.name}")
    lines: list[str] = []
    for struct in structs.values():
        lines += struct_lines(struct)
    lines += ["@final", "class FFI:", "    NULL: Any", "    errno: int"]
    for struct in structs.values():
        lines += new_lines(struct)
    lines += [FFI_COMMON, "@final", "class Lib:"]
    lines += [f"    {name}: int" for name in constants]
    for function in functions:
        lines += function_lines(function)
    lines += ["", "ffi: FFI", "lib: Lib"]
    return _prologue() + "\n" + "\n".join(lines) + "\n"


def _prologue() -> str:
    kinds = [kind for kind in [*SIGNED, *UNSIGNED, "int", "char"] if "ptr" not in kind]
    pointers = ",\n    ".join(f'"{kind} *"' for kind in kinds if kind != "char")
    arrays = ",\n    ".join(f'"{kind}[]"' for kind in kinds if kind != "char")
    return PROLOGUE.format(integer_pointers=pointers, integer_arrays=arrays)


if __name__ == "__main__":
    sys.stdout.write(stub(HEADER.read_text()))
