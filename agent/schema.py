"""The policy's schema: its JSON Schema, and the faults of a document that does not follow it.

What a single value may be stands in `agent.values`; a document without a fault is read without this room
(`agent.document`), for pydantic takes longer to import than most verbs to run.
"""

from __future__ import annotations

from collections.abc import Callable
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

from agent import values
from agent.addresses import Address, Prefix
from agent.faults import KINDS, meant, plain, spelled
from agent.model import UNREACHABLE, Kernel
from agent.toml_lines import Place

# Every field may be None, which TOML itself can't say: that is what a value at fault is replaced by. A validator's
# message completes "VALUE …".


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
_LinkName = Annotated[str, AfterValidator(values.link), Field(json_schema_extra={"minLength": 1, "maxLength": 15})]
_LinkNames = Annotated[list[_LinkName | None], Tag("list")]
_Addresses = Annotated[list[Annotated[Address, _text_as(values.own_address)] | None], Tag("list")]
_NextHops = Annotated[list[Annotated[Address, _text_as(values.next_hop)] | None], Tag("list")]
_Member = Annotated[Prefix | values.ListFile, _text_as(values.member)]
_Integer = Annotated[int, AfterValidator(values.integer)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ProbeTable(_Table):
    """A health check that the identity sends by its own link, from its own address."""

    target: Annotated[Address, _text_as(values.probe_target)] | None = Field(
        description="The address that has to answer, somewhere behind the identity's link."
    )
    every: Annotated[float, _text_as(values.every)] | None = Field(
        default=2.0,
        description='How often it is asked, from "100ms" to "1h"; it has as long to answer.',
        json_schema_extra={"default": "2s", "pattern": f"^{values.DURATION}$"},
    )
    fail_after: Annotated[_Integer, AfterValidator(values.fail_after)] | None = Field(
        default=3,
        description="So many without an answer in a row, and the identity counts as down; as many answered in a row, "
        "and it is up again.",
        json_schema_extra={"minimum": 1, "maximum": 100},
    )
    port: Annotated[_Integer, AfterValidator(values.port)] | None = Field(
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

    mark_mask: Annotated[_Integer, AfterValidator(values.mark_mask)] | None = Field(
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
    nft_table: Annotated[str, AfterValidator(values.nft_table)] | None = Field(
        default=_KERNEL.nft_table,
        description="The name of our nftables table (family inet).",
        json_schema_extra={"pattern": "^idmark[A-Za-z0-9_]{0,25}$"},
    )
    hook_priority: Annotated[_Integer, AfterValidator(values.hook_priority)] | None = Field(
        default=_KERNEL.hook_priority,
        description="The priority of our chains: after conntrack (-200) and mangle (-150), before dstnat (-100).",
        json_schema_extra={"minimum": -199, "maximum": -101},
    )
    enforce: bool | None = Field(
        default=_KERNEL.enforce,
        description="Drop a packet that is about to leave by a link which is not its identity's; false: only count it.",
    )
    way_bits: Annotated[_Integer, AfterValidator(values.way_bits)] | None = Field(
        default=_KERNEL.way_bits,
        description="So many upper bits of mark_mask number the ways out (link, next_hop, when_down) that identities "
        "without own addresses and probes share: one rule a way instead of one an identity. 0: none are shared.",
        json_schema_extra={"minimum": 0, "maximum": 16},
    )
    nat: Annotated[object, PlainValidator(values.nat), WithJsonSchema({"enum": ["auto", True, False]})] = Field(
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

    gateway: Annotated[str, AfterValidator(values.gateway)] | None = Field(
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


def faults(tables: dict[str, Any]) -> list[tuple[Place, str]]:
    """What is wrong in a document, and where. Puts None where a value is at fault, and drops unknown keys."""
    try:
        Document.model_validate(tables)
    except ValidationError as error:
        errors = [(_place(tables, details), details) for details in error.errors(include_url=False)]
    else:
        return []
    found = [(where, _told(where, details)) for where, details in errors]
    for where, details in errors:
        holder: Any = tables
        for part in where[:-1]:
            holder = holder[part]
        if details["type"] == "extra_forbidden":
            del holder[where[-1]]
        else:
            holder[where[-1]] = None
    return found


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
