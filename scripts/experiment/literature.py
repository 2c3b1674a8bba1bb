"""What others have found on averaged weights, in respect of what the study asks.

Titles, authors, years and places were looked up. Read were the abstracts, but for those of
Satterthwaite, Ruppert and Karnin et al., who are cited for what others cite them for, and of
Schwarzer et al. and Fujimoto et al. the published code. What a work leaves open is said as far as
that shows, and no further: of paired runs, past policies chosen at equal evaluation cost, and
learning-rate decay.
"""

LITERATURE = r"""Averages of iterates:

- Ruppert (1988). Efficient estimations from a slowly convergent Robbins-Monro process. Technical
  report 781, Cornell University, Operations Research and Industrial Engineering. Proposes the
  average of all iterates, for linear problems in one dimension.
- Polyak, Juditsky (1992). Acceleration of stochastic approximation by averaging. SIAM Journal on
  Control and Optimization 30(4), 838-855, doi:10.1137/0330046. Proves that the average of all
  iterates converges at the best possible rate, for classical problems of optimisation and
  identification; not about policies.
- Izmailov, Podoprikhin, Garipov, Vetrov, Wilson (2018). Averaging weights leads to wider optima and
  better generalization. UAI 2018, arXiv:1803.05407. Averages points of training at a constant or
  cyclical rate: image classification.

Averaging and decay:

- Morales-Brotons, Vogels, Hendrikx (2024). Exponential moving average of weights in deep learning:
  dynamics and benefits. Transactions on Machine Learning Research, arXiv:2411.18704. Finds that an
  EMA needs less decay of the learning rate; not about policies.
- Ajroldi, Orvieto, Geiping (2025). When, where and why to average weights? ICML 2025, PMLR 267,
  925-941, arXiv:2502.06761. Finds averaging and annealing best together, on seven workloads; not
  about policies.

Policies that act with averaged or past weights:

- Nikishin, Izmailov, Athiwaratkun, Podoprikhin, Garipov, Shvechikov, Vetrov, Wilson (2018).
  Improving stability in deep reinforcement learning with weight averaging. UAI 2018 workshop on
  uncertainty in deep learning. Reports better average rewards of averaged policies on several Atari
  and MuJoCo environments; its abstract names no comparison with past policies or with decay.
- Schwarzer, Obando-Ceron, Courville, Bellemare, Agarwal, Castro (2023). Bigger, better, faster:
  human-level Atari with human-level efficiency. ICML 2023, arXiv:2305.19452. Its published
  configuration acts with the target network, an EMA at tau = 0.005.
- Fujimoto, Chang, Smith, Gu, Precup, Meger (2023). For SALE: state-action representation learning
  for deep reinforcement learning. NeurIPS 2023, arXiv:2306.02451. Its published code keeps a past
  policy, chosen by its worst training episode.
- Ramé, Ferret, Vieillard, Dadashi, Hussenot, Cedoz, Sessa, Girgin, Douillard, Bachem (2024). WARP:
  on the benefits of weight averaged rewarded policies. arXiv:2406.16768. Averages language models'
  weights at three stages of their alignment.

Averages inside of training:

- Anschel, Baram, Shimkin (2017). Averaged-DQN: variance reduction and stabilization for deep
  reinforcement learning. ICML 2017, arXiv:1611.01929. Averages past estimates of values, not
  weights, in the targets: training changes.
- Hilton, Cobbe, Schulman (2022). Batch size-invariance for policy optimization. NeurIPS 2022,
  arXiv:2110.00641. Averages the policy's weights for PPO's proximal policy: training changes.

Why there is something to average out:

- Schaul, Barreto, Quan, Ostrovski (2022). The phenomenon of policy churn. NeurIPS 2022,
  arXiv:2206.00730. Finds that a handful of updates changes the greedy action in a large part of the
  states.
- Rahn, D'Oro, Wiltzer, Bacon, Bellemare (2023). Policy optimization in a noisy neighborhood: on
  return landscapes in continuous control. NeurIPS 2023, arXiv:2309.14597. Finds that a single
  update leads to a wide range of returns, and paths between weights along which a policy becomes
  stabler.
- Tang, Berseth (2024). Improving deep reinforcement learning by reducing the chain effect of value
  and policy churn. NeurIPS 2024, arXiv:2409.04792. Reduces churn by a term in the loss: training
  changes.

Methods:

- Satterthwaite (1946). An approximate distribution of estimates of variance components. Biometrics
  Bulletin 2(6), 110-114. The degrees of freedom of the intervals over several cells.
- Holm (1979). A simple sequentially rejective multiple test procedure. Scandinavian Journal of
  Statistics 6, 65-70. The adjustment of the secondary family.
- Karnin, Koren, Somekh (2013). Almost optimal exploration in multi-armed bandits. ICML 2013, PMLR
  28, 1238-1246. Sequential halving, by which polyak\_rl.choose deals out episodes.
- Agarwal, Schwarzer, Castro, Courville, Bellemare (2021). Deep reinforcement learning at the edge
  of the statistical precipice. NeurIPS 2021, arXiv:2108.13264. Intervals in place of points, and
  interquartile means, which stand beside the means here.
- Patterson, Neumann, White, White (2024). Empirical design in reinforcement learning. Journal of
  Machine Learning Research 25(318), 1-63, arXiv:2304.01315. How experiments in the field go wrong,
  and tests that fit them.""".replace("\n  ", " ")
"""By what they are about, as Markdown: a work is a line, which is broken only here."""
