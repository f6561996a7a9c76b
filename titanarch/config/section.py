"""The base of every configuration schema."""

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, Strict
from pydantic_core import CoreSchema, core_schema

Item = TypeVar("Item")

ListOf = Annotated[tuple[Item, ...], Strict(False)]
"""A TOML array as a tuple; its items stay strictly typed."""


class _OneOrMore:
    """Lets a single item stand for an array of one."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def as_tuple(value: Any) -> tuple[Any, ...]:
            return tuple(value) if isinstance(value, list | tuple) else (value,)

        return core_schema.no_info_before_validator_function(as_tuple, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        array = handler(schema)
        return {"anyOf": [array["items"], array]}


OneOrMore = Annotated[tuple[Item, ...], _OneOrMore()]
"""An item or a TOML array of items, as a tuple."""

FREE: dict[str, Any] = {"identity": False}
"""``Field(..., json_schema_extra=FREE)``: a run may be resumed with another value."""

IDENTITY: dict[str, Any] = {"identity": True}
"""``Field(..., json_schema_extra=IDENTITY)``: a run resumed with another value would be another run."""


class Section(BaseModel):
    """A frozen table of the configuration: strict types, unknown keys are errors.

    Every field has ``Field(description=...)``, one line with its unit. A subclass says with the class keyword
    ``identity`` whether its fields are part of what a run *is* (the default) or may change when it is resumed;
    a single field differs through ``json_schema_extra=FREE`` or ``IDENTITY``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=False)
    identity_by_default: ClassVar[bool] = True

    def __init_subclass__(cls, *, identity: bool | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if identity is not None:
            cls.identity_by_default = identity

    @classmethod
    def is_identity(cls, field: str) -> bool:
        """Whether a run resumed with another value of ``field`` would be another run."""
        extra = cls.model_fields[field].json_schema_extra
        return bool(extra.get("identity", cls.identity_by_default)) if isinstance(extra, dict) else cls.identity_by_default
