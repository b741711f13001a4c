# Sourced by the scripts of long tables, which set $out, the folder of their runs: what is finished is never repeated.

mkdir -p "$out/done" || exit

# once MARK COMMAND...: which goes on where it was stopped
once() {
    mark=$out/done/$1
    shift
    test -e "$mark" && return
    "$@" || exit
    touch "$mark"
}

# resumed PATH: the option, where an unfinished one lies there
resumed() {
    if test -e "$1"; then echo --resume; fi
}
