"""Which variables a chat template reads."""

from __future__ import annotations

from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from fastkl.trainer.errors import ConfigError

HELPERS = ("raise_exception", "strftime_now")  # functions that Transformers gives to each template


class _Generation(Extension):
    """The block `{% generation %}` of Transformers' templates, which marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def template_variables(template: str) -> set[str]:
    """The names that a template reads and does not set itself; a default that it sets where there is none is no setting.

    Raises:
        ConfigError: For a template that is no Jinja.
    """
    environment = Environment(extensions=[_Generation, loopcontrols])
    try:
        tree = environment.parse(template)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the tokenizer's chat template is no Jinja (line {error.lineno}): {str(error.message)[:200]!r}; mend it"
        ) from error
    names = list(tree.find_all(nodes.Name))
    own = {name.name for name in names if name.ctx in ("store", "param")} - _tested(tree)
    return meta.find_undeclared_variables(tree) - own - {*environment.globals, *HELPERS}


def _tested(tree: nodes.Template) -> set[str]:
    """The names for which a template asks whether they are given."""
    asked = [test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    asked += [use.node for use in tree.find_all(nodes.Filter) if use.name in ("default", "d") and use.node is not None]
    return {node.name for node in asked if isinstance(node, nodes.Name)}
