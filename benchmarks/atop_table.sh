#!/bin/sh
# Everything behind docs/results/atop.md. The same command goes on after a stop and runs no finished row again.
# REDAN_DATA names the folder of data sets; the tables are FOLDER/*/sweep.md, results of other threats lie with the runs.
#
#   sh benchmarks/atop_table.sh [FOLDER] [STEPS]
out=${1:-runs/atop}
attack=purification-${2:-50}
status=0

# table NAME RECIPE... [OPTION...]: each under the protocol, on the first 512 test images
table() {
    name=$1
    shift
    redan sweep "$@" --attack "$attack" --samples 512 --out "$out/$name" || status=$?
    test $status -le 1 || exit $status # 1: a row failed, which the others can do without
}

table plain standard-cifar10-mini pgd-at-cifar10-mini
table rt2 atop-off-rt2-cifar10-mini atop-clean-cifar10-mini atop-code-cifar10-mini atop-cifar10-mini
# Before an AR-AT classifier, where that run is.
test -d runs/arat-cifar10-mini && table arat atop-arat-cifar10-mini
table others atop-off-rt1-cifar10-mini atop-rt1-cifar10-mini atop-off-rt3-cifar10-mini atop-rt3-cifar10-mini
# One mask for ever; noise alone. The mask alone is RT1.
table masks atop-cifar10-mini --grid purification.transform.masks=fixed
table noise atop-cifar10-mini --grid purification.transform.missing=0.0
# Threats that training did not see.
for run in "$out/plain/pgd-at-cifar10-mini-seed0" "$out/rt2/atop-cifar10-mini-seed0"; do
    redan evaluate "$run" --attack "$attack" --samples 512 --threat l2:0.5 --threat l2:1.0 --threat stadv:0.05 --resume ||
        exit
done
exit $status
