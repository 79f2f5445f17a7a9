# For `make msgs`: the CMake files of the ROS 2 wheels name the Python and numpy include folders of
# the machine that the wheels were built on. CMake stops at an include folder that does not exist,
# so those are dropped here, from this build's targets only. The package's own targets look for
# Python and numpy themselves and find the right ones. Nothing of the wheels is changed.

function(drop_missing_include_folders)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(folders ${target} INTERFACE_INCLUDE_DIRECTORIES)
    if(folders)
      set(kept "")
      foreach(folder IN LISTS folders)
        if(folder MATCHES "^[$]<" OR EXISTS "${folder}")
          list(APPEND kept "${folder}")
        endif()
      endforeach()
      set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${kept}")
    endif()
  endforeach()
endfunction()

# At the end of the package's CMakeLists.txt, when all targets are known.
cmake_language(DEFER CALL drop_missing_include_folders)
