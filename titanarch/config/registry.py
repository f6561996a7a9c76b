"""Registries: the components of one slot by name, and the configuration field that picks one."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, TypeVar, cast

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from titanarch.config.errors import did_you_mean
from titanarch.config.section import Section

SLOT = "x-slot"
"""The key of a JSON schema that stands for a component of the slot it names."""


class ComponentConfig(Section):
    """The table of one component. Registering the component sets ``kind``, its name in the table."""

    kind: ClassVar[str] = ""
    kind_key: ClassVar[str] = "kind"

    @model_serializer(mode="wrap")
    def _with_kind(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {self.kind_key: self.kind, **serialize(self)}


C = TypeVar("C")
R = TypeVar("R")


class Registry(Generic[R]):
    """The components of one slot: classes with the class attribute ``Config``, the schema of their table.

    Register with ``@ACTIVATIONS.register("relu")``. Use as the metadata of a configuration field,
    ``activation: Annotated[ActivationConfig, ACTIVATIONS]``: the field then takes ``"relu"`` or
    ``{kind = "relu", ...}`` and holds the component's own Config, whatever is registered by then.
    ``key``: the key of the table that names the component, where it is not ``kind``.
    """

    def __init__(self, slot: str, key: str = "kind") -> None:
        self.slot = slot
        self.key = key
        self._components: dict[str, type[R]] = {}

    def register(self, name: str) -> Callable[[type[C]], type[C]]:
        """Class decorator: make the component known under ``name``. A taken name is a ValueError."""

        def add(component: type[C]) -> type[C]:
            if name in self._components:
                raise ValueError(f"{self.slot} '{name}' is registered already, by {self._components[name].__qualname__}")
            config = _config_of(component)
            if vars(config).get("kind"):  # its own: a Config may extend that of another component
                raise ValueError(f"{config.__qualname__} serves '{config.kind}'; '{name}' needs a Config of its own")
            config.kind = name
            config.kind_key = self.key
            self._components[name] = cast(type[R], component)
            return component

        return add

    def __getitem__(self, name: str) -> type[R]:
        return self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._components))

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def of(self, config: ComponentConfig) -> type[R]:
        """The component that ``config`` configures."""
        return self._components[config.kind]

    def resolve(self, value: Any) -> Any:
        """A name, a table with ``kind``, or a Config made already, as the component's Config."""
        if isinstance(value, ComponentConfig):
            return value
        table = {self.key: value} if isinstance(value, str) else value
        if not isinstance(table, dict) or not isinstance(table.get(self.key), str):
            raise PydanticCustomError("component_form", f"the name of a known {self.slot} ({', '.join(self)}) or a table with '{self.key}'")
        kind = table[self.key]
        if kind not in self._components:
            raise PydanticCustomError("component", f"unknown {self.slot} '{kind}'{did_you_mean(kind, self)}")
        return _config_of(self._components[kind]).model_validate({k: v for k, v in table.items() if k != self.key})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.resolve,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda config: config.model_dump()),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The slot by name; ``config.schema`` puts the schemas of its components in."""
        return {SLOT: self.slot}


def _config_of(component: type[Any]) -> type[ComponentConfig]:
    config: type[ComponentConfig] = component.Config
    return config
