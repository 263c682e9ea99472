"""A route is handed the services, and a ticket where it serves a request, as arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from server.admission import Ticket
from server.services import Services


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def _ticket(services: Annotated[Services, Depends(_services)]) -> Iterator[Ticket]:
    # left after the last byte of the response was sent
    with services.admission.ticket() as ticket:
        yield ticket


GivenServices = Annotated[Services, Depends(_services)]
GivenTicket = Annotated[Ticket, Depends(_ticket)]
