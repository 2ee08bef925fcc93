"""What mypy is told of torch, diffusers and transformers where their annotations mislead it.

- `ModelMixin.__getattr__` returns Any, which would hide every misspelt attribute of a U-Net or a
  VAE: it is an error here. (Registered modules are assigned in constructors, where mypy sees them.)
- `config` is annotated as a dictionary; its entries are attributes, too, so it is Any here.
- `to` is wrapped (`functools.wraps(torch.nn.Module.to)`) and loses its `self`; here it is
  `torch.nn.Module.to`.
- `torch.nn.Module.to` takes `memory_format`, which its annotations leave out.
"""

from collections.abc import Callable

from mypy.errorcodes import ATTR_DEFINED
from mypy.nodes import ARG_NAMED_OPT
from mypy.plugin import AttributeContext, MethodSigContext, Plugin
from mypy.typeops import bind_self
from mypy.types import AnyType, FunctionLike, Instance, Type, TypeOfAny, get_proper_type

MODULE = "torch.nn.modules.module.Module"
MODEL = "diffusers.models.modeling_utils.ModelMixin"


class ModelPlugin(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        if fullname == "diffusers.configuration_utils.ConfigMixin.config":
            return lambda context: AnyType(TypeOfAny.explicit)
        if fullname in (f"{MODEL}.to", "transformers.modeling_utils.PreTrainedModel.to"):
            return _module_to
        owner, _, name = fullname.rpartition(".")
        if owner == MODEL:
            return lambda context: _known(context, name)
        return None

    def get_method_signature_hook(
        self, fullname: str
    ) -> Callable[[MethodSigContext], FunctionLike] | None:
        return _with_memory_format if fullname.endswith(".to") else None


def _module_to(context: AttributeContext) -> Type:
    model = get_proper_type(context.type)
    assert isinstance(model, Instance)
    module = next(base for base in model.type.mro if base.fullname == MODULE)
    to = get_proper_type(module.names["to"].type)
    assert isinstance(to, FunctionLike)
    return bind_self(to, model)


def _with_memory_format(context: MethodSigContext) -> FunctionLike:
    signature, model = context.default_signature, get_proper_type(context.type)
    if not (isinstance(model, Instance) and model.type.has_base(MODULE)):
        return signature
    return signature.copy_modified(
        arg_types=[*signature.arg_types, context.api.named_generic_type("torch.memory_format", [])],
        arg_kinds=[*signature.arg_kinds, ARG_NAMED_OPT],
        arg_names=[*signature.arg_names, "memory_format"],
    )


def _known(context: AttributeContext, name: str) -> Type:
    model = get_proper_type(context.type)
    if isinstance(model, Instance) and model.type.get(name) is None:
        error = f'"{model.type.name}" has no attribute "{name}"'
        context.api.fail(error, context.context, code=ATTR_DEFINED)
    return context.default_attr_type


def plugin(version: str) -> type[ModelPlugin]:
    return ModelPlugin
