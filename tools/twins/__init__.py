"""How `make_aio` turns a sync module into its asyncio twin."""
