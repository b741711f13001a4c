#!/bin/sh
# Everything behind docs/results/arat.md: some eight hours on two cores. The same command goes on after a stop and runs
# no finished row again. REDAN_DATA names the folder of data sets; the tables are FOLDER/*/sweep.md.
#
#   sh benchmarks/arat_table.sh [FOLDER]
out=${1:-runs/arat}
status=0
redan sweep pgd-at-cifar10-mini trades-cifar10-mini arat-cifar10-mini --seeds 0,1,2 \
    --attack autoattack --samples 1000 --analyse --out "$out/seeds" || status=$?
test $status -le 1 || exit $status # 1: a row failed, which the others can do without
redan sweep standard-cifar10-mini mart-cifar10-mini lbgat-cifar10-mini arrest-cifar10-mini arat-swa-cifar10-mini \
    -o validation.every=1 --attack autoattack --samples 1000 --analyse --out "$out/others" || status=$?
test $status -le 1 || exit $status
redan sweep arat-ablation-cifar10-mini --grid method.split_bn=false,true --grid method.predictor=false,true \
    --grid method.stop_gradient=false,true --attack autoattack --samples 500 --analyse --out "$out/ablation" || status=$?
exit $status
