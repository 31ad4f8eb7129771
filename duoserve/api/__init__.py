"""What speaks OpenAI's API: requests into the service's, its events into replies."""
