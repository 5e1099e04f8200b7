//! Collectives of CPU ranks: over buffers in host memory, by one [`Link`] to each rank that this rank exchanges data with.
//!
//! Floats travel as they lie in memory, so all hosts must have the same byte order.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::{Collective, CollectiveError, Link};
use crate::backend::cpu::{Buffer, CpuBackend};
use crate::config::Mesh;

/// Floats of a sum that are exchanged at a time, so that they are added while they are in the cache.
const PIECE: usize = 32 << 10;

/// The links of one rank and the algorithms over them. Blocks until the data is there or a peer is gone.
pub struct HostCollective {
    mesh: Mesh,
    rank: usize,
    links: BTreeMap<usize, Box<dyn Link>>,
    /// A piece of another rank's summand.
    received: Box<[f32]>,
}

impl HostCollective {
    /// `links` has one link to each of [`HostCollective::partners`], by rank.
    pub fn new(mesh: Mesh, rank: usize, links: BTreeMap<usize, Box<dyn Link>>) -> Self {
        assert!(links.keys().copied().eq(Self::partners(mesh, rank)), "links that do not fit the mesh");
        Self { mesh, rank, links, received: vec![0.0; PIECE].into() }
    }

    /// For a mesh of one rank.
    pub fn single() -> Self {
        Self::new(Mesh { tp: 1, pp: 1 }, 0, BTreeMap::new())
    }

    /// The ranks that `rank` exchanges data with: its partners in sums, tensor-parallel rank 0 and the others of its group, and
    /// its like in the stages before and after.
    pub fn partners(mesh: Mesh, rank: usize) -> BTreeSet<usize> {
        let tp_rank = mesh.tp_rank(rank);
        let leader = rank - tp_rank;
        let sums = sum_distances(mesh).map(|distance| leader + (tp_rank ^ distance));
        let gathers = if tp_rank == 0 { leader + 1..leader + mesh.tp } else { leader..leader + 1 };
        let previous = rank.checked_sub(mesh.tp);
        let next = Some(rank + mesh.tp).filter(|&next| next < mesh.world_size());
        sums.chain(gathers).chain(previous).chain(next).collect()
    }

    /// Sums `x` over the tensor-parallel group, in place; `x` has the same length on all its ranks.
    ///
    /// # Errors
    /// A rank of the group is gone.
    pub fn sum(&mut self, x: &mut [f32]) -> Result<(), CollectiveError> {
        let tp_rank = self.mesh.tp_rank(self.rank);
        for distance in sum_distances(self.mesh) {
            let peer = self.rank - tp_rank + (tp_rank ^ distance);
            let link = self.links.get_mut(&peer).expect("a link to every partner");
            for piece in x.chunks_mut(PIECE) {
                let received = &mut self.received[..piece.len()];
                link.exchange(bytemuck::cast_slice(piece), bytemuck::cast_slice_mut(received))
                    .map_err(lost(peer, "summing"))?;
                for (x, received) in piece.iter_mut().zip(received) {
                    *x += *received;
                }
            }
        }
        Ok(())
    }

    /// Puts the columns of the group's `x`, [rows, width] each, side by side into `out` [rows, tp · width] on tensor-parallel rank 0;
    /// the others only send.
    ///
    /// # Errors
    /// A rank of the group is gone.
    pub fn gather(&mut self, width: usize, x: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
        let tp_rank = self.mesh.tp_rank(self.rank);
        if tp_rank != 0 {
            return self.send(self.rank - tp_rank, x, "gathering columns");
        }
        let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width * self.mesh.tp));
        assert!(rows.len() * width == x.len(), "rows that do not fit");
        for (x, out) in rows {
            let (own, others) = out.split_at_mut(width);
            own.copy_from_slice(x);
            for (index, columns) in others.chunks_exact_mut(width).enumerate() {
                let peer = self.rank + 1 + index;
                let link = self.links.get_mut(&peer).expect("a link to every partner");
                link.recv(bytemuck::cast_slice_mut(columns)).map_err(lost(peer, "gathering columns"))?;
            }
        }
        Ok(())
    }

    /// Sends `x` to the same tensor-parallel rank of the next stage, which takes as many floats.
    ///
    /// # Errors
    /// That rank is gone.
    pub fn send_to_next(&mut self, x: &[f32]) -> Result<(), CollectiveError> {
        self.send(self.rank + self.mesh.tp, x, "handing over to the next stage")
    }

    /// Fills `x` from the same tensor-parallel rank of the previous stage.
    ///
    /// # Errors
    /// That rank is gone.
    pub fn recv_from_previous(&mut self, x: &mut [f32]) -> Result<(), CollectiveError> {
        let peer = self.rank - self.mesh.tp;
        let link = self.links.get_mut(&peer).expect("a link to every partner");
        link.recv(bytemuck::cast_slice_mut(x)).map_err(lost(peer, "taking over from the previous stage"))
    }

    fn send(&mut self, peer: usize, x: &[f32], doing: &'static str) -> Result<(), CollectiveError> {
        let link = self.links.get_mut(&peer).expect("a link to every partner");
        link.send(bytemuck::cast_slice(x)).map_err(lost(peer, doing))
    }
}

/// How far apart in the group the partners of each round of a sum are: 1, 2, 4, … below tp.
fn sum_distances(mesh: Mesh) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |distance| Some(distance * 2)).take_while(move |&distance| distance < mesh.tp)
}

fn lost(peer: usize, doing: &'static str) -> impl FnOnce(io::Error) -> CollectiveError {
    move |source| CollectiveError::Lost { peer, doing, source }
}

impl Collective<CpuBackend> for HostCollective {
    fn all_reduce(&mut self, rows: usize, x: &mut Buffer) -> Result<(), CollectiveError> {
        self.sum(x.rows_mut(rows))
    }

    fn gather_columns(&mut self, rows: usize, x: &Buffer, out: &mut Buffer) -> Result<(), CollectiveError> {
        self.gather(x.width(), x.rows(rows), out.rows_mut(rows))
    }

    fn send_next(&mut self, rows: usize, x: &Buffer) -> Result<(), CollectiveError> {
        self.send_to_next(x.rows(rows))
    }

    fn recv_previous(&mut self, rows: usize, x: &mut Buffer) -> Result<(), CollectiveError> {
        self.recv_from_previous(x.rows_mut(rows))
    }

    fn check(&self) -> Result<(), CollectiveError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::thread;
    use std::time::{Duration, Instant};

    use super::super::{shm, tcp};
    use super::*;

    type Pair = fn() -> (Box<dyn Link>, Box<dyn Link>);

    const LINKS: [Pair; 2] = [tcp::tests::pair, shm::tests::pair];

    /// All ranks of a mesh, connected by `pair`.
    fn ranks(mesh: Mesh, pair: Pair) -> Vec<HostCollective> {
        let mut links: Vec<BTreeMap<usize, Box<dyn Link>>> = (0..mesh.world_size()).map(|_| BTreeMap::new()).collect();
        for low in 0..mesh.world_size() {
            for high in HostCollective::partners(mesh, low).into_iter().filter(|&peer| peer > low) {
                let (a, b) = pair();
                links[low].insert(high, a);
                links[high].insert(low, b);
            }
        }
        links.into_iter().enumerate().map(|(rank, links)| HostCollective::new(mesh, rank, links)).collect()
    }

    /// Runs every rank on a thread and returns what they return, by rank.
    fn run<T: Send>(ranks: &mut [HostCollective], work: impl Fn(&mut HostCollective) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let threads: Vec<_> = ranks.iter_mut().map(|rank| scope.spawn(|| work(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Floats of very different sizes, so that another order of additions gives other bits.
    fn values(seed: usize, length: usize) -> Vec<f32> {
        let mut state = seed as u32 ^ 0x9e37_79b9;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        (0..length).map(|_| (next() as f32 - 8e6) * 2f32.powi((next() % 24) as i32 - 12)).collect()
    }

    /// ((v0 + v1) + (v2 + v3)) + …
    fn tree_sum(summands: &[Vec<f32>]) -> Vec<f32> {
        if let [only] = summands {
            return only.clone();
        }
        let (left, right) = summands.split_at(summands.len() / 2);
        tree_sum(left).into_iter().zip(tree_sum(right)).map(|(a, b)| a + b).collect()
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn partners_are_mutual() {
        for (tp, pp) in [(1, 1), (2, 1), (4, 2), (8, 2), (8, 3), (1, 5)] {
            let mesh = Mesh { tp, pp };
            for rank in 0..mesh.world_size() {
                let partners = HostCollective::partners(mesh, rank);
                assert!(!partners.contains(&rank));
                assert!(partners.iter().all(|&peer| HostCollective::partners(mesh, peer).contains(&rank)));
            }
        }
        let of = |rank| Vec::from_iter(HostCollective::partners(Mesh { tp: 8, pp: 2 }, rank));
        assert_eq!(of(0), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(of(11), [3, 8, 9, 10, 15]);
    }

    #[test]
    fn a_sum_is_a_binary_tree_bit_for_bit_on_every_rank() {
        for pair in LINKS {
            for tp in [1, 2, 4, 8] {
                let mut ranks = ranks(Mesh { tp, pp: 1 }, pair);
                for length in [0, 1, 7, PIECE, 100_003] {
                    let expected = bits(&tree_sum(&(0..tp).map(|rank| values(rank, length)).collect::<Vec<_>>()));
                    let sums = run(&mut ranks, |rank| {
                        let mut x = values(rank.rank, length);
                        rank.sum(&mut x).unwrap();
                        bits(&x)
                    });
                    assert!(sums.iter().all(|sum| *sum == expected), "tp {tp}, {length} floats");
                }
            }
        }
    }

    #[test]
    fn exchanges_larger_than_any_buffer_do_not_block() {
        let sent: Vec<u8> = (0..20 << 20).map(|i| (i % 253) as u8).collect();
        for pair in LINKS {
            let (mut a, mut b) = pair();
            thread::scope(|scope| {
                for link in [&mut a, &mut b] {
                    scope.spawn(|| {
                        let mut received = vec![0; sent.len()];
                        link.exchange(&sent, &mut received).unwrap();
                        assert!(received == sent);
                    });
                }
            });
        }
    }

    #[test]
    fn columns_are_gathered_side_by_side_on_rank_0_only() {
        let (rows, width) = (5, 3001);
        for pair in LINKS {
            for tp in [1, 2, 8] {
                let outs = run(&mut ranks(Mesh { tp, pp: 1 }, pair), |rank| {
                    let mut out = vec![-1.0; rows * width * tp];
                    rank.gather(width, &values(rank.rank, rows * width), &mut out).unwrap();
                    out
                });
                for (index, row) in outs[0].chunks_exact(width).enumerate() {
                    assert_eq!(row, &values(index % tp, rows * width)[index / tp * width..][..width]);
                }
                assert!(outs[1..].iter().flatten().all(|&x| x == -1.0));
            }
        }
    }

    #[test]
    fn stages_hand_over_to_the_same_tensor_parallel_rank() {
        let mesh = Mesh { tp: 4, pp: 2 };
        for pair in LINKS {
            for length in [1, 700_000] {
                let received = run(&mut ranks(mesh, pair), |rank| {
                    let mut x = values(rank.rank, length);
                    if mesh.stage(rank.rank) == 0 {
                        rank.sum(&mut x).unwrap();
                        rank.send_to_next(&x).unwrap();
                    } else {
                        rank.recv_from_previous(&mut x).unwrap();
                        rank.sum(&mut x).unwrap();
                    }
                    bits(&x)
                });
                let first = tree_sum(&(0..4).map(|rank| values(rank, length)).collect::<Vec<_>>());
                let second = bits(&tree_sum(&vec![first.clone(); 4]));
                assert!(received[..4].iter().all(|x| *x == bits(&first)));
                assert!(received[4..].iter().all(|x| *x == second));
            }
        }
    }

    fn is_lost(error: &CollectiveError, rank: usize) -> bool {
        matches!(error, CollectiveError::Lost { peer, .. } if *peer == rank)
    }

    #[test]
    fn a_rank_that_goes_is_named_at_once() {
        for pair in LINKS {
            let mut ranks = ranks(Mesh { tp: 2, pp: 2 }, pair);
            run(&mut ranks, |rank| rank.sum(&mut [1.0; 10]).unwrap());
            drop(ranks.remove(1));
            let start = Instant::now();
            let error = ranks[0].sum(&mut [1.0; 10]).unwrap_err();
            assert_eq!(error.to_string(), "lost the connection to rank 1 (summing)");
            let error = ranks[2].recv_from_previous(&mut [0.0; 10]).unwrap_err();
            assert!(is_lost(&error, 1));
            // More than any buffer takes.
            let mut ranks = self::ranks(Mesh { tp: 1, pp: 2 }, pair);
            drop(ranks.pop());
            assert!(is_lost(&ranks[0].send_to_next(&vec![0.0; 5 << 20]).unwrap_err(), 1));
            assert!(start.elapsed() < Duration::from_secs(1));
        }
    }

    #[test]
    fn a_rank_that_goes_while_another_waits_is_named_at_once() {
        for pair in LINKS {
            let mut ranks = ranks(Mesh { tp: 2, pp: 1 }, pair);
            let mut other = ranks.pop().unwrap();
            let waiting = thread::spawn(move || ranks[0].sum(&mut [1.0; 200_000]));
            // Takes a part of the exchange, so that the other is in the middle of it.
            other.links.get_mut(&0).unwrap().exchange(&[0; 1000], &mut [0; 1000]).unwrap();
            drop(other);
            let start = Instant::now();
            assert!(is_lost(&waiting.join().unwrap().unwrap_err(), 1));
            assert!(start.elapsed() < Duration::from_secs(1));
        }
    }

    #[test]
    fn one_rank_alone_needs_no_links() {
        let mut single = HostCollective::single();
        let (mut x, mut out) = ([1.0, 2.0], [0.0; 2]);
        single.sum(&mut x).unwrap();
        single.gather(1, &x, &mut out).unwrap();
        assert_eq!(out, [1.0, 2.0]);
    }
}
