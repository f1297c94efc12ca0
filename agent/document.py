"""The policy's document: which keys may stand in it, and what a single value may be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import ErrorDetails, core_schema

from agent.faults import KINDS, meant, plain, spelled
from agent.model import UNREACHABLE, Address, Family, Kernel, Prefix, parse_address
from agent.toml_lines import Place

# Every field may be None, which TOML itself can't say: that is what a value at fault is replaced by, so that the checks
# of what values are to each other have the rest of the document before them. A validator's message completes "VALUE …".

#: Where packets of an identity neither come from nor go to by a next hop (RFC 1122, 4291; IANA's special registries).
_SPECIAL = {
    Prefix.parse(network): kind
    for network, kind in {
        "0.0.0.0/32": "unspecified",
        "127.0.0.0/8": "loopback",
        "169.254.0.0/16": "link-local",
        "224.0.0.0/4": "multicast",
        "255.255.255.255/32": "limited broadcast",
        "::/128": "unspecified",
        "::1/128": "loopback",
        "::ffff:0:0/96": "IPv4-mapped",
        "fe80::/10": "link-local",
        "ff00::/8": "multicast",
    }.items()
}
#: A duration: digits and a unit.
DURATION = r"([0-9]{1,7})(ms|s|m|h)"

_SPECIAL_OF = {family: [special for special in _SPECIAL.items() if special[0].family is family] for family in Family}
#: The first bytes that addresses of these have; nearly all of a million prefixes have another.
_SPECIAL_BYTES = {
    family: {
        byte
        for special, _ in specials
        for byte in range(special.address >> family.bits - 8, (special.last >> family.bits - 8) + 1)
    }
    for family, specials in _SPECIAL_OF.items()
}


@dataclass(frozen=True, slots=True)
class ListFile:
    """A member of the form `file:NAME`."""

    name: str


def _special(prefix: Prefix) -> str | None:
    """What a network is that lies wholly in a special one. 0.0.0.0/0 does not: it stands for all the others too."""
    if prefix.address >> prefix.family.bits - 8 not in _SPECIAL_BYTES[prefix.family]:
        return None
    for special, kind in _SPECIAL_OF[prefix.family]:
        if special.length <= prefix.length and special.address <= prefix.address <= special.last:
            return kind
    return None


def parse_source(text: str) -> Prefix:
    prefix = Prefix.parse(text)
    if kind := _special(prefix):
        raise ValueError(f"is {kind}: it cannot be a source")
    return prefix


def _member(text: str) -> Prefix | ListFile:
    if not text.startswith("file:"):
        return parse_source(text)
    if text == "file:":
        raise ValueError("names no file")
    return ListFile(text.removeprefix("file:"))


def _address(text: str) -> Address:
    for mark in "/%":
        if mark in text:
            raise ValueError(f'is not a plain address: leave out "{mark}{text.partition(mark)[2]}"')
    return parse_address(text)


def _own_address(text: str) -> Address:
    address = _address(text)
    parse_source(str(address))
    return address


def _next_hop(text: str) -> Address:
    address = _address(text)
    if (kind := _special(Prefix.host(address))) not in {None, "link-local"}:
        raise ValueError(f"is {kind}: it cannot be a next hop")
    return address


def _probe_target(text: str) -> Address:
    address = _address(text)
    if kind := _special(Prefix.host(address)):
        raise ValueError(f"is {kind}: it cannot be probed")
    return address


def _every(text: str) -> float:
    """Seconds, from a duration with its unit."""
    match = re.fullmatch(DURATION, text)
    if match is None:
        raise ValueError('is no duration: "500ms", "2s" and "1m" are')
    seconds = int(match[1]) * {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}[match[2]] / 1000
    if not 0.1 <= seconds <= 3600:
        raise ValueError("does not lie in 100ms..1h")
    return seconds


def _fail_after(count: int) -> int:
    if not 1 <= count <= 100:
        raise ValueError("does not lie in 1..100")
    return count


def _port(port: int) -> int:
    if not 1 <= port <= 65535:
        raise ValueError("is no port: 1..65535 is")
    return port


def _link(name: str) -> str:
    if not 1 <= len(name.encode()) <= 15:
        raise ValueError("is no link name: the kernel takes 1 to 15 bytes")
    if name in {".", "..", "all", "default"}:
        raise ValueError("is no link name: the kernel keeps it for itself")
    if name == "lo":
        raise ValueError("is the loopback: nothing leaves the host by it")
    for char in name:
        # The kernel: dev_valid_name() in net/core/dev.c; % makes a pattern of a name. nft: no escape in its strings.
        if char in '/:%"\\' or char.isspace() or not char.isprintable():
            raise ValueError(f"is no link name: it holds {json.dumps(char)}")
    if name.endswith("*"):
        raise ValueError("is no link name: nft takes the last * for a wildcard")
    return name


def _gateway(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise ValueError("is no name: 1 to 63 letters, digits, dots, hyphens and underscores are")
    return name


def _integer(number: int) -> int:
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("does not fit 64 bits")
    return number


def _mark_mask(mask: int) -> int:
    if not 0 < mask <= 0xFFFFFFFF:
        raise ValueError("is no mask: 1 to 0xffffffff is")
    ones = mask // (mask & -mask)
    if ones & ones + 1:
        raise ValueError(f"({mask:#x}) is no mask: its bits must stand side by side")
    return mask


def _nft_table(name: str) -> str:
    if not re.fullmatch(r"idmark[A-Za-z0-9_]{0,25}", name):
        raise ValueError('is no name of ours: "idmark" and up to 25 letters, digits or underscores are')
    return name


def _hook_priority(priority: int) -> int:
    if not -200 < priority < -100:
        raise ValueError("does not lie in -199..-101: after conntrack (-200), before dstnat (-100)")
    return priority


def _way_bits(bits: int) -> int:
    if not 0 <= bits <= 16:
        raise ValueError("does not lie in 0..16")
    return bits


def _nat(value: object) -> object:
    if value is not None and value != "auto" and not isinstance(value, bool):
        raise ValueError('must be "auto", true or false')
    return value


def _text_as(read: Callable[[str], object]) -> PlainValidator:
    """A value of another type that TOML holds as a string."""

    def validate(value: object) -> object:
        if not isinstance(value, str):
            raise ValueError(f"must be a string, not {KINDS[type(value)]}")
        return read(value)

    return PlainValidator(validate, json_schema_input_type=str)


def _words_or_list(value: object) -> str:
    return "list" if isinstance(value, list) else "words"


_Auto = Annotated[Literal["auto"], Tag("words")]
_LinkName = Annotated[str, AfterValidator(_link), Field(json_schema_extra={"minLength": 1, "maxLength": 15})]
_LinkNames = Annotated[list[_LinkName | None], Tag("list")]
_Addresses = Annotated[list[Annotated[Address, _text_as(_own_address)] | None], Tag("list")]
_NextHops = Annotated[list[Annotated[Address, _text_as(_next_hop)] | None], Tag("list")]
_Member = Annotated[Prefix | ListFile, _text_as(_member)]
_Integer = Annotated[int, AfterValidator(_integer)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ProbeTable(_Table):
    """A health check that the identity sends by its own link, from its own address."""

    target: Annotated[Address, _text_as(_probe_target)] | None = Field(
        description="The address that has to answer, somewhere behind the identity's link."
    )
    every: Annotated[float, _text_as(_every)] | None = Field(
        default=2.0,
        description='How often it is asked, from "100ms" to "1h"; it has as long to answer.',
        json_schema_extra={"default": "2s", "pattern": f"^{DURATION}$"},
    )
    fail_after: Annotated[_Integer, AfterValidator(_fail_after)] | None = Field(
        default=3,
        description="So many without an answer in a row, and the identity counts as down; as many answered in a row, "
        "and it is up again.",
        json_schema_extra={"minimum": 1, "maximum": 100},
    )
    port: Annotated[_Integer, AfterValidator(_port)] | None = Field(
        default=None,
        description="Connect to this TCP port, rather than send ICMP echo requests.",
        json_schema_extra={"minimum": 1, "maximum": 65535},
    )


class IdentityTable(_Table):
    """An identity: whose packets, and the road that they take."""

    id: _Integer | None = Field(
        description="A small number of its own, from 1 up. The fwmark is made of it, the number of the routing table "
        "(kernel.table_base + id), and the priority of its rules (kernel.rule_priority + id).",
        json_schema_extra={"minimum": 1},
    )
    link: _LinkName | None = Field(description="The one interface that the identity's packets may leave by.")
    addresses: Annotated[_Auto | _Addresses, Discriminator(_words_or_list)] | None = Field(
        default=[],
        description="The host's own addresses that are this identity's, without a length; or \"auto\": "
        "the global addresses that the link has.",
    )
    members: list[_Member | None] | None = Field(
        default=[],
        description='Sources behind the gateway that speak as this identity: networks, addresses, and "file:NAME" '
        "for a list of them, one a line with # comments, beside the policy. The longest prefix decides.",
    )
    next_hop: (
        Annotated[
            Annotated[Literal["none", "auto"], Tag("words")] | _NextHops,
            Discriminator(_words_or_list),
        ]
        | None
    ) = Field(
        default="auto",
        description='Where the default route leads: a list of one address a family; "none": straight into the link '
        '(point-to-point); "auto": wherever main\'s default on this link leads.',
    )
    when_down: str | None = Field(
        default=UNREACHABLE,
        description='While the link is down: "unreachable" (fail closed), "main" (follow the main table), or the '
        "name of the identity whose road is taken.",
    )
    masquerade: bool | None = Field(
        default=False, description="Translate members to this identity's own address as they leave by its link."
    )
    clamp_mss: bool | None = Field(default=False, description="Clamp the MSS of TCP SYNs to the path MTU of this link.")
    probe: ProbeTable | None = Field(
        default=None, description="A health check: a link that is up may have a dead far end. None by default."
    )
    flush_flows: bool | None = Field(
        default=False,
        description="Forget the identity's tracked connections when its road changes (conntrack), so that translated "
        "ones are translated anew.",
    )


_KERNEL = Kernel()


class KernelTable(_Table):
    """Where in the kernel's name spaces all of it lives."""

    mark_mask: Annotated[_Integer, AfterValidator(_mark_mask)] | None = Field(
        default=_KERNEL.mark_mask,
        description="The bits of the packet mark that are ours, side by side: 0x3f000000 unless others have these.",
        json_schema_extra={"minimum": 1, "maximum": 0xFFFFFFFF},
    )
    table_base: _Integer | None = Field(
        default=_KERNEL.table_base, description="The routing table of identity n is table_base + n."
    )
    rule_priority: _Integer | None = Field(
        default=_KERNEL.rule_priority,
        description="The priority of identity n's rules is rule_priority + n; below 5210, or Tailscale's come first.",
    )
    nft_table: Annotated[str, AfterValidator(_nft_table)] | None = Field(
        default=_KERNEL.nft_table,
        description="The name of our nftables table (family inet).",
        json_schema_extra={"pattern": "^idmark[A-Za-z0-9_]{0,25}$"},
    )
    hook_priority: Annotated[_Integer, AfterValidator(_hook_priority)] | None = Field(
        default=_KERNEL.hook_priority,
        description="The priority of our chains: after conntrack (-200) and mangle (-150), before dstnat (-100).",
        json_schema_extra={"minimum": -199, "maximum": -101},
    )
    enforce: bool | None = Field(
        default=_KERNEL.enforce,
        description="Drop a packet that is about to leave by a link which is not its identity's; false: only count it.",
    )
    way_bits: Annotated[_Integer, AfterValidator(_way_bits)] | None = Field(
        default=_KERNEL.way_bits,
        description="So many upper bits of mark_mask number the ways out (link, next_hop, when_down) that identities "
        "without own addresses and probes share: one rule a way instead of one an identity. 0: none are shared.",
        json_schema_extra={"minimum": 0, "maximum": 16},
    )
    nat: Annotated[object, PlainValidator(_nat), WithJsonSchema({"enum": ["auto", True, False]})] = Field(
        default="auto",
        description='Whether anything on this host translates addresses: "auto" is what the host shows. Where nothing '
        "does, no rule asks for the connection of a packet, and the kernel need not track any.",
    )
    drop_own_sources: bool | None = Field(
        default=_KERNEL.drop_own_sources,
        description="Drop what arrives over IPv4 with one of this host's own addresses as its source. The kernel finds "
        "that out by a second walk through all rules for every packet; with this it may be told not to, by sysctl: "
        "accept_local = 1 on links whose rp_filter is 0.",
    )


class Document(_Table):
    """An idmark policy."""

    gateway: Annotated[str, AfterValidator(_gateway)] | None = Field(
        description="The name of this gateway, for reviews and metrics.",
        json_schema_extra={"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"},
    )
    downstream: Annotated[_Auto | _LinkNames, Discriminator(_words_or_list)] | None = Field(
        default="auto",
        description="The interfaces with the hosts behind this gateway: their routes are good for every identity; "
        'or "auto": the connected networks of every interface that is no identity\'s link.',
    )
    identity: dict[str, IdentityTable | None] | None = Field(
        description="The identities by name.",
        json_schema_extra={"minProperties": 1, "propertyNames": {"pattern": "^[a-z][a-z0-9_-]{0,30}$"}},
    )
    kernel: KernelTable | None = Field(
        default=KernelTable(), description="Where in the kernel's name spaces all of it lives; all optional."
    )


#: The table that a key stands in, by the length of the key's path.
_TABLES: dict[int, type[_Table]] = {1: Document, 2: KernelTable, 3: IdentityTable, 4: ProbeTable}


def schema() -> dict[str, Any]:
    """The JSON Schema of the document."""
    return {"$schema": _TomlSchema.schema_dialect, **Document.model_json_schema(schema_generator=_TomlSchema)}


class _TomlSchema(GenerateJsonSchema):
    """A schema without null: TOML has none."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


def read_document(tables: dict[str, Any]) -> tuple[Document, list[tuple[Place, str]]]:
    """What stands in the document, with None for what is at fault, and these faults. Takes `tables` over."""
    try:
        return Document.model_validate(tables), []
    except ValidationError as error:
        errors = [(_place(tables, details), details) for details in error.errors(include_url=False)]
    faults = [(where, _told(where, details)) for where, details in errors]
    for where, details in errors:
        holder: Any = tables
        for part in where[:-1]:
            holder = holder[part]
        if details["type"] == "extra_forbidden":
            del holder[where[-1]]
        else:
            holder[where[-1]] = None
    return Document.model_validate(tables), faults


def _place(tables: dict[str, Any], details: ErrorDetails) -> Place:
    """Where in the document pydantic means: its locations name branches of unions too."""
    where: Place = ()
    holder: Any = tables
    # A literal's location ends in the name of its branch; a list's has one where only a number could stand.
    for part in details["loc"][: -1 if details["type"] in {"literal_error", "missing"} else None]:
        if isinstance(holder, dict) or isinstance(part, int):
            holder = holder[part]
            where = (*where, part)
    return (*where, details["loc"][-1]) if details["type"] == "missing" else where


def _told(where: Place, details: ErrorDetails) -> str:
    """The fault in the reader's words."""
    value, context = details["input"], details.get("ctx", {})
    match details["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return f"unknown key{meant(str(where[-1]), _TABLES[len(where)].model_fields)}"
        case "literal_error":
            words = context["expected"].replace("'", '"').replace(" or ", ", ")
            return f"{spelled(value)} must be {words} or a list"
        case "value_error":
            return f"{plain(value)} {context['error']}"
        case kind:
            wanted = {
                "int_type": "an integer",
                "string_type": "a string",
                "bool_type": "true or false",
                "list_type": "a list",
            }.get(kind, "a table")
            return f"{spelled(value)} must be {wanted}, not {KINDS[type(value)]}"
