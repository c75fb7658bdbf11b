"""Raw material -> documented on-disk formats, and their readers; one folder per format."""
