# shellcheck shell=bash
# Sourced by job.sh and node.sh.

# Usage: wait_through_signals PROCESS. Returns the exit code of a background process. Bash ends `wait` at each signal
# that is trapped; a trap that sets `interrupted` makes it wait on.
wait_through_signals() {
    local status
    interrupted=1
    while ((interrupted)); do
        interrupted=0
        status=0
        wait "$1" || status=$?
    done
    return "$status"
}
