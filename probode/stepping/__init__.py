"""One step (``step``), one attempt of it in an adaptive solve (``adaptive``), the loop of attempts (``passing``)."""
