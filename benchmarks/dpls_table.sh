#!/bin/sh
# Everything behind docs/results/dpls.md. The same command goes on after a stop and runs no finished row again.
# REDAN_DATA names the folder of data sets; benchmarks/dpls_tables.py FOLDER prints the tables.
#
#   sh benchmarks/dpls_table.sh [FOLDER]
out=${1:-runs/dpls}
status=0

# table NAME SEEDS RECIPE...: each recipe under each attack, best and last checkpoint
table() {
    name=$1 seeds=$2
    shift 2
    for attack in pgd-20 pgd-20:cw autoattack; do
        case $attack in autoattack) samples=300 ;; *) samples=1000 ;; esac
        for checkpoint in best last; do
            redan sweep "$@" --seeds "$seeds" --attack $attack --samples $samples --checkpoint $checkpoint \
                --out "$out/$name" || status=$?
            test $status -le 1 || exit $status # 1: a row failed, which the others can do without
        done
    done
}

table pgd-at 0,1,2 dpls-off-pgd-at-cifar10-mini dpls-uniform-pgd-at-cifar10-mini dpls-permuted-pgd-at-cifar10-mini \
    dpls-pgd-at-cifar10-mini
redan data prune "$out/pgd-at/dpls-off-pgd-at-cifar10-mini-seed0" --drop-hardest 0.1 --out "$out/pruned.json" || exit
table pruned 0 dpls-pruned-pgd-at-cifar10-mini dpls-pruned-trades-cifar10-mini -o data.indices="$out/pruned.json"
table others 0 dpls-inverse-pgd-at-cifar10-mini dpls-off-trades-cifar10-mini dpls-uniform-trades-cifar10-mini \
    dpls-permuted-trades-cifar10-mini dpls-inverse-trades-cifar10-mini dpls-trades-cifar10-mini \
    dpls-off-arat-cifar10-mini dpls-arat-cifar10-mini
table cifar100 0 dpls-off-pgd-at-cifar100-mini dpls-uniform-pgd-at-cifar100-mini dpls-permuted-pgd-at-cifar100-mini \
    dpls-pgd-at-cifar100-mini
exit $status
