"""What people see in a terminal: tables of plain values, and a view that follows a sweep."""
