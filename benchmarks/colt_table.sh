#!/bin/sh
# Everything behind docs/results/colt.md. The same command goes on after a stop and repeats nothing that is finished.
# REDAN_DATA names the folder of data sets; benchmarks/colt_tables.py FOLDER prints the tables.
#
#   sh benchmarks/colt_table.sh [FOLDER] [SECONDS]       SECONDS: for each image that bounds leave open
out=${1:-runs/colt}
seconds=${2:-10}
. "$(dirname "$0")/once.sh"

# row METHODS RECIPE...: each trained, attacked, and certified by each method, on the first 1,000 test images
row() {
    methods=$1
    shift
    for recipe in "$@"; do
        run=$out/$recipe
        once "$recipe" redan train "$recipe" --out "$run" $(resumed "$run/recipe.yaml")
        once "$recipe-autoattack" redan evaluate "$run" --attack autoattack --samples 1000 --no-curve \
            $(resumed "$run"/results/autoattack-*.partial)
        for method in $methods; do
            once "$recipe-$method" redan certify "$run" --method "$method" --samples 1000 --timeout "$seconds" \
                --no-curve $(resumed "$run"/certificates/"$method"-*.partial)
        done
    done
}

row 'zonotope colt cascade' colt-mnist-mini pgd-at-mnist-mini
row 'zonotope colt cascade' colt-cifar10-mini pgd-at-cifar10-mini-convmed
row 'interval zonotope cascade' ibp-mnist-mini crown-ibp-mnist-mini sabr-mnist-mini mtl-ibp-mnist-mini
row 'interval cascade' ibp-mnist-mini-cnn7 crown-ibp-mnist-mini-cnn7 sabr-mnist-mini-cnn7 mtl-ibp-mnist-mini-cnn7
