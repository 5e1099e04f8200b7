//! Checkpoints of `torch.distributed.checkpoint`: a pickle `.metadata` says in which slice of which `.distcp` file each chunk of a tensor
//! is; each slice is a zip file of `torch.save` whose member `…/data/0` has the elements, uncompressed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Cursor;
use std::path::PathBuf;

use super::array::{Array, Axes, check_shape};
use super::folder::{Folder, Member, is_plain_name};
use super::pickle::{Index, Pickle};
use super::{CheckpointError, Dtype, StoredDtype};

const METADATA: &str = ".metadata";

pub(super) struct TorchDist {
    /// Of the weights, within the checkpoint.
    directory: &'static str,
    metadata: PathBuf,
    tensors: BTreeMap<String, TensorInfo>,
    /// By the tensor's name and the chunk's first element.
    places: HashMap<(String, Vec<usize>), Place>,
    files: BTreeMap<String, Member>,
}

struct TensorInfo {
    dtype: String,
    shape: Vec<usize>,
    /// First element and sizes.
    chunks: Vec<(Vec<usize>, Vec<usize>)>,
}

/// A slice of a `.distcp` file.
struct Place {
    file: String,
    offset: usize,
    length: usize,
}

impl TorchDist {
    pub(super) fn open(folder: &Folder, directory: &'static str) -> Result<Self, CheckpointError> {
        let name = format!("{directory}/{METADATA}");
        let metadata = folder.path(&name);
        let damaged = |problem: String| CheckpointError::damaged(&metadata, problem);
        let pickle = folder.require(&name)?.read(Pickle::parse)?.map_err(damaged)?;
        let unknown = || damaged("it is not the metadata of a torch.distributed checkpoint".to_owned());
        let (tensors, places) = read(&pickle).ok_or_else(unknown)?;
        let mut files = BTreeMap::new();
        for file in places.values().map(|place| &place.file).collect::<BTreeSet<_>>() {
            if !is_plain_name(file) {
                return Err(damaged(format!("{file:?} is not the name of a file beside it")));
            }
            files.insert(file.clone(), folder.require(&format!("{directory}/{file}"))?);
        }
        Ok(Self { directory, metadata, tensors, places, files })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Names and sizes of the files.
    pub(super) fn files(&self) -> impl Iterator<Item = (String, u64)> {
        self.files.iter().map(|(name, member)| (name.clone(), member.len as u64))
    }

    /// A tensor's shape as [layers, rows, columns].
    pub(super) fn shape(&self, name: &str, axes: Axes) -> Result<[usize; 3], CheckpointError> {
        self.spread(name, axes, &self.info(name)?.shape, 1)
    }

    /// The tensor `name`, if it has the expected shape and chunks that fill it.
    pub(super) fn array(
        &self,
        folder: &Folder,
        name: &str,
        axes: Axes,
        expected: [usize; 3],
    ) -> Result<Array, CheckpointError> {
        let info = self.info(name)?;
        check_shape(name, axes, self.shape(name, axes)?, expected, &self.metadata)?;
        let dtype = match info.dtype.as_str() {
            "torch.bfloat16" => Dtype::Bf16,
            "torch.float16" => Dtype::F16,
            "torch.float32" => Dtype::F32,
            other => {
                let (tensor, file, dtype) = (name.to_owned(), self.metadata.clone(), other.to_owned());
                return Err(CheckpointError::Dtype { tensor, file, dtype });
            }
        };
        let mut chunks = BTreeMap::new();
        for (start, sizes) in &info.chunks {
            let (first, sizes) = (self.spread(name, axes, start, 0)?, self.spread(name, axes, sizes, 1)?);
            chunks.insert(first, (sizes, start));
        }
        let mut bounds = [0, 1, 2].map(|axis| {
            let starts: BTreeSet<usize> = chunks.keys().map(|first| first[axis]).collect();
            starts.into_iter().collect::<Vec<_>>()
        });
        for axis in 0..3 {
            bounds[axis].push(expected[axis]);
        }
        // Each place of the lattice that the starts span has exactly one chunk, which reaches to the next one.
        let is_lattice = bounds.iter().map(|bounds| bounds.len() - 1).product::<usize>() == chunks.len()
            && bounds.iter().all(|bounds| bounds[0] == 0 && bounds.is_sorted_by(|a, b| a < b))
            && chunks.iter().all(|(first, (sizes, _))| {
                (0..3).all(|axis| {
                    let next = bounds[axis].partition_point(|start| *start <= first[axis]);
                    bounds[axis][next] - first[axis] == sizes[axis]
                })
            });
        if !is_lattice {
            return Err(self.damaged(format!("the chunks of tensor {name} do not fill it")));
        }
        let members = chunks
            .values()
            .map(|(sizes, start)| self.chunk(folder, name, start, sizes.iter().product::<usize>() * dtype.size()));
        let chunks = members.collect::<Result<_, _>>()?;
        Ok(Array { name: name.to_owned(), axes, dtype: StoredDtype::Plain(dtype), bounds, chunks })
    }

    /// The elements of the chunk that begins at `start`.
    fn chunk(&self, folder: &Folder, name: &str, start: &[usize], bytes: usize) -> Result<Member, CheckpointError> {
        let place = self.places.get(&(name.to_owned(), start.to_owned()));
        let place =
            place.ok_or_else(|| self.damaged(format!("no file has the chunk of tensor {name} at {start:?}")))?;
        let Place { file, offset, length } = place;
        let member = &self.files[file];
        let path = folder.path(&format!("{}/{file}", self.directory));
        let damaged =
            |problem: &str| CheckpointError::damaged(&path, format!("{problem} (tensor {name} at {start:?})"));
        let end = offset.checked_add(*length).filter(|end| *end <= member.len);
        let end = end.ok_or_else(|| damaged("a chunk goes on beyond its end"))?;
        let place = member.read(|bytes| elements(&bytes[*offset..end]))?.map_err(damaged)?;
        if place.len() != bytes {
            return Err(damaged(&format!("a chunk has {} bytes instead of {bytes}", place.len())));
        }
        let offset = member.offset + offset + place.start;
        Ok(Member { file: member.file.clone(), offset, len: bytes })
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        let missing = || CheckpointError::MissingTensor { tensor: name.to_owned(), path: self.metadata.clone() };
        self.tensors.get(name).ok_or_else(missing)
    }

    /// Indices on three axes; an axis that the tensor does not have is at 0, or 1 long.
    fn spread(&self, name: &str, axes: Axes, values: &[usize], absent: usize) -> Result<[usize; 3], CheckpointError> {
        if values.len() != axes.len() {
            let problem = format!("tensor {name} has {} axes instead of {}", values.len(), axes.len());
            return Err(self.damaged(problem));
        }
        let mut all = [absent; 3];
        axes.iter().zip(values).for_each(|(&axis, &value)| all[axis] = value);
        Ok(all)
    }

    fn damaged(&self, problem: String) -> CheckpointError {
        CheckpointError::damaged(&self.metadata, problem)
    }
}

/// Where the elements of a saved tensor are in its zip file.
fn elements(bytes: &[u8]) -> Result<std::ops::Range<usize>, &'static str> {
    let mut zip = zip::ZipArchive::new(Cursor::new(bytes)).map_err(|_| "a chunk is no saved tensor")?;
    let data = (0..zip.len())
        .find(|i| zip.name_for_index(*i).is_some_and(|name| name.is_ok_and(|name| name.ends_with("/data/0"))));
    let file = data.and_then(|i| zip.by_index_raw(i).ok()).ok_or("a chunk has no elements")?;
    if file.compression() != zip::CompressionMethod::Stored || file.encrypted() {
        return Err("a chunk is compressed");
    }
    let start = file.data_start().and_then(|start| usize::try_from(start).ok());
    let end = start.zip(usize::try_from(file.size()).ok()).and_then(|(start, size)| start.checked_add(size));
    start.zip(end).filter(|(_, end)| *end <= bytes.len()).map(|(start, end)| start..end).ok_or("a chunk is cut")
}

type Tensors = BTreeMap<String, TensorInfo>;
type Places = HashMap<(String, Vec<usize>), Place>;

/// Tensors and their chunks' places from the metadata; what is no tensor is left out.
fn read(pickle: &Pickle) -> Option<(Tensors, Places)> {
    let sizes = |index: Index| -> Option<Vec<usize>> {
        let [sizes] = pickle.args_of(index, "torch.Size")? else { return None };
        pickle.items(*sizes)?.iter().map(|size| pickle.size(*size)).collect()
    };
    let root = pickle.root();
    let mut tensors = Tensors::new();
    for &(name, metadata) in pickle.dict(pickle.attribute(root, "state_dict_metadata")?)? {
        let (Some(name), Some(properties)) = (pickle.text(name), pickle.attribute(metadata, "properties")) else {
            continue;
        };
        let dtype = *pickle.items(pickle.state(properties)?)?.first()?;
        let chunks = pickle.items(pickle.attribute(metadata, "chunks")?)?.iter().map(|chunk| {
            Some((sizes(pickle.attribute(*chunk, "offsets")?)?, sizes(pickle.attribute(*chunk, "sizes")?)?))
        });
        let info = TensorInfo {
            dtype: pickle.global(dtype)?.to_owned(),
            shape: sizes(pickle.attribute(metadata, "size")?)?,
            chunks: chunks.collect::<Option<_>>()?,
        };
        tensors.insert(name.to_owned(), info);
    }
    let mut places = Places::new();
    for &(key, info) in pickle.dict(pickle.attribute(root, "storage_data")?)? {
        let name = pickle.text(pickle.attribute(key, "fqn")?)?;
        // Objects that are no tensors have no offset.
        let Some(start) = pickle.attribute(key, "offset").and_then(sizes) else { continue };
        let place = Place {
            file: pickle.text(pickle.attribute(info, "relative_path")?)?.to_owned(),
            offset: pickle.size(pickle.attribute(info, "offset")?)?,
            length: pickle.size(pickle.attribute(info, "length")?)?,
        };
        places.insert((name.to_owned(), start), place);
    }
    Some((tensors, places))
}
