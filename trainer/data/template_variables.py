"""Which variables a chat template reads."""

from __future__ import annotations

from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from fastkl.trainer.errors import ConfigError


class _Generation(Extension):
    """The block `{% generation %}` of Transformers' templates, which marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def template_variables(template: str) -> set[str]:
    """The names that a template does not set itself before it reads them.

    Raises:
        ConfigError: For a template that is no Jinja.
    """
    environment = Environment(extensions=[_Generation, loopcontrols])
    try:
        return meta.find_undeclared_variables(environment.parse(template))
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the tokenizer's chat template is no Jinja (line {error.lineno}): {str(error.message)[:200]!r}; mend it"
        ) from error
